"""The file of packed weights.

`packed.safetensors` holds, for every quantised array of the parameter table, its codes under the
array's name (uint8 [E, panels, groups, 64], see `packing`) and one scale for each of its matrices
under the name with `_scale` (float32); all other tensors stand as in `model.safetensors`. The header
names version, layout and format and carries a checksum, as JSON under the key `mhmoe_packed`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.model.packed import packed_format
from mhmoe_np.model.parameters import Entry, parameter_table
from mhmoe_np.model.weights import Weights, floats, formats_for, matrix_starts
from mhmoe_np.operations.packing import LAYOUT, FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.table import PackedWeight, Weight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.tensors import read_into, read_metadata, save_tensors
from mhmoe_np.types import FloatArray

VERSION = 1
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
        else:
            for part in entry.parts:
                tensors[part.tensor] = floats(weight)[part.where]
    return tensors


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def save_packed_weights(path: Path, config: ModelConfig, weights: Weights) -> None:
    """Write packed float32 weights, atomically.

    Raises OSError: the disk is full or refuses; `path` is as it was.
    """
    tensors = packed_tensors(config, weights)
    header = {
        "version": VERSION,
        "layout": LAYOUT,
        "format": packed_format(weights),
        "sha256": _checksum(tensors),
    }
    save_tensors(path, tensors, {HEADER_KEY: json.dumps(header)})


def _read_header(path: Path, config: ModelConfig) -> tuple[FormatName, str]:
    """The format of a file that this release reads, and its checksum."""
    try:
        header = json.loads(read_metadata(path).get(HEADER_KEY, ""))
        version, layout, name, checksum = (
            header[key] for key in ("version", "layout", "format", "sha256")
        )
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not written by mhmoe-np pack: its header says nothing under {HEADER_KEY!r}"
        ) from None
    for key, found, known in (("version", version, VERSION), ("layout", layout, LAYOUT)):
        if found != known:
            raise UserError(
                f"{path}: {key} is {found!r}, this release reads {known!r}; pack the checkpoint again"
            )
    for format in formats_for(config):
        if name == format:
            return format, checksum
    raise UserError(f"{path}: {name!r} does not hold quantization {config.quantization!r}")


def load_packed_weights(path: Path, config: ModelConfig, dtype: DTypeLike) -> Weights:
    """Read a packed file; nothing is unpacked. What is not quantised is converted to `dtype`.

    Raises UserError: missing, damaged, of another version, layout or package, or not of `config`.
    """
    format, checksum = _read_header(path, config)
    table = parameter_table(config)
    floats: dict[str, FloatArray] = {}
    targets: dict[str, NDArray[Any]] = {}
    for entry in table:
        if entry.quantised:
            *stack, outputs, inputs = entry.shape
            targets[entry.name] = empty_code(math.prod(stack), outputs, inputs, format)
            targets[_scale_name(entry)] = np.empty(len(entry.parts), np.float32)
        else:
            array = floats[entry.name] = np.empty(entry.shape, np.float32)
            targets |= {part.tensor: array[part.where] for part in entry.parts}
    read_into(path, targets)
    if _checksum(targets) != checksum:
        raise UserError(f"{path}: damaged: its contents do not match its checksum; pack again")
    arrays: dict[str, Weight] = {}
    for entry in table:
        if entry.quantised:
            outputs, inputs = entry.shape[-2:]
            scale_of_row = np.repeat(targets[_scale_name(entry)], np.diff(matrix_starts(entry)))
            arrays[entry.name] = PackedWeight(
                PackedMatrices(targets[entry.name], outputs, inputs, format),
                scale_of_row.reshape(-1, outputs).astype(dtype, copy=False),
            )
        else:
            arrays[entry.name] = floats[entry.name].astype(dtype, copy=False)
    return Weights(config, arrays)
