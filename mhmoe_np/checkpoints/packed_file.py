"""The file of packed weights.

`packed.safetensors` holds, for every quantised array of the parameter table, its codes under the
array's name (uint8 [E, panels, groups, 64], see `packing`) and one scale for each of its matrices
under the name with `_scale` (float32); in the format int8, for every linear map's array but the
router's, its integers (int8, of the same shape) and a scale for each block of 32 inputs (float16
[E, panels, blocks, 16], see `int8`). All other tensors stand as in `model.safetensors`. The header
names version, layout and format and carries a checksum, as JSON under the key `mhmoe_packed`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.model.packed import packed_format
from mhmoe_np.model.parameters import Entry, parameter_table
from mhmoe_np.model.weights import Weights, floats, formats_for, holds_int8, matrix_starts
from mhmoe_np.operations.int8 import INT8, Int8Weight, empty_int8
from mhmoe_np.operations.packing import LAYOUT, FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.table import PackedWeight, Weight
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.reading import parse_json
from mhmoe_np.storage.tensors import check_finite, read_into, read_metadata, write_tensors
from mhmoe_np.types import FloatArray

VERSION = 2  # in 1 the checksum was of the tensors alone; it is read too
HEADER_KEY = "mhmoe_packed"


def _scale_name(entry: Entry) -> str:
    return f"{entry.name}_scale"


def packed_tensors(config: ModelConfig, weights: Weights) -> dict[str, NDArray[Any]]:
    """Every tensor of the file by name, in the table's order; `weights` are the host's."""
    tensors: dict[str, NDArray[Any]] = {}
    for entry in parameter_table(config):
        weight = weights.arrays[entry.name]
        if isinstance(weight, PackedWeight):
            tensors[entry.name] = weight.w.code
            tensors[_scale_name(entry)] = weight.beta.ravel()[list(matrix_starts(entry)[:-1])]
        elif isinstance(weight, Int8Weight):
            tensors[entry.name], tensors[_scale_name(entry)] = weight.q, weight.scale
        else:
            for part in entry.parts:
                tensors[part.tensor] = floats(weight)[part.where]
    return tensors


def _checksum(tensors: Mapping[str, NDArray[Any]], *said: object) -> str:
    """Of the tensors and of what the header says of them."""
    digest = hashlib.sha256("".join(f"{value}\n" for value in said).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def write_packed_weights(path: Path, config: ModelConfig, weights: Weights) -> None:
    """Write packed float32 weights.

    Raises OSError: the disk is full or refuses.
    """
    tensors, format = packed_tensors(config, weights), packed_format(weights)
    header = {
        "version": VERSION,
        "layout": LAYOUT,
        "format": format,
        "sha256": _checksum(tensors, VERSION, LAYOUT, format),
    }
    write_tensors(path, tensors, {HEADER_KEY: json.dumps(header)})


def _read_header(
    path: Path, config: ModelConfig
) -> tuple[FormatName | Literal["int8"], list[object], str]:
    """The format of a file that this release reads, what its checksum is of, and the checksum."""
    text = read_metadata(path).get(HEADER_KEY, "")
    try:
        header = parse_json(text, source=str(path))
        version, layout, name, checksum = (
            header[key] for key in ("version", "layout", "format", "sha256")
        )
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{path}: not written by mhmoe-np pack: its header says nothing under {HEADER_KEY!r}"
        ) from None
    for key, found, known in (("version", version, (1, VERSION)), ("layout", layout, (LAYOUT,))):
        if found not in known:
            raise UserError(
                f"{path}: {key} is {found!r}, this release reads {known[-1]!r}; pack the checkpoint "
                "again"
            )
    for format in (*formats_for(config), INT8):
        if name == format:
            return format, [] if version == 1 else [version, layout, name], checksum
    raise UserError(f"{path}: {name!r} does not hold quantization {config.quantization!r}")


def load_packed_weights(
    path: Path, config: ModelConfig, dtype: DTypeLike, on_progress: OnProgress = unseen
) -> Weights:
    """Read a packed file; nothing is unpacked. What is not quantised is converted to `dtype`.

    on_progress: counts bytes.

    Raises UserError: missing, damaged, of another version, layout or package, or not of `config`.
    """
    format, said, checksum = _read_header(path, config)
    table = parameter_table(config)
    floats: dict[str, FloatArray] = {}
    eights: dict[str, Int8Weight] = {}
    targets: dict[str, NDArray[Any]] = {}
    for entry in table:
        if format == INT8 and holds_int8(entry):
            *stack, outputs, inputs = entry.shape
            weight = eights[entry.name] = empty_int8(math.prod(stack), outputs, inputs)
            targets[entry.name], targets[_scale_name(entry)] = weight.q, weight.scale
        elif format != INT8 and entry.quantised:
            *stack, outputs, inputs = entry.shape
            targets[entry.name] = empty_code(math.prod(stack), outputs, inputs, format)
            targets[_scale_name(entry)] = np.empty(len(entry.parts), np.float32)
        else:
            array = floats[entry.name] = np.empty(entry.shape, np.float32)
            targets |= {part.tensor: array[part.where] for part in entry.parts}
    read_into(path, targets, on_progress)
    if _checksum(targets, *said) != checksum:
        raise Damaged(f"{path}: damaged: its contents do not match its checksum; pack again")
    check_finite(path, {name: tensor for name, tensor in targets.items() if tensor.dtype.kind == "f"})
    for name, weight in eights.items():
        if np.signbit(weight.scale).any():
            raise Damaged(f"{path}: tensor {name + '_scale'!r} holds negative scales; pack again")
    arrays: dict[str, Weight] = {**eights}
    for entry in table:
        if entry.name in eights:
            continue
        if format != INT8 and entry.quantised:
            outputs, inputs = entry.shape[-2:]
            scale_of_row = np.repeat(targets[_scale_name(entry)], np.diff(matrix_starts(entry)))
            arrays[entry.name] = PackedWeight(
                PackedMatrices(targets[entry.name], outputs, inputs, format),
                scale_of_row.reshape(-1, outputs).astype(dtype, copy=False),
            )
        else:
            arrays[entry.name] = floats[entry.name].astype(dtype, copy=False)
    return Weights(config, arrays)
