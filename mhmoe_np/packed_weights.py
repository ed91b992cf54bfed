"""Packed weights of a whole model: from float parameters, to and from a file, and back to floats.

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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.config import ModelConfig
from mhmoe_np.errors import UserError
from mhmoe_np.model.parameters import Entry, Parameters, parameter_table
from mhmoe_np.model.weights import Weights, formats_for, matrix_starts, requantise
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight, Weight
from mhmoe_np.packing import LAYOUT, FormatName, PackedMatrices, empty_code, unpack
from mhmoe_np.tensors import read_into, read_metadata, save_tensors
from mhmoe_np.types import FloatArray

VERSION = 1
HEADER_KEY = "mhmoe_packed"


def pack_weights(parameters: Parameters, format: FormatName, *, ops: Operations) -> Weights:
    """Quantise and pack; what is not quantised stays as it is, as views of the parameters."""
    weights = Weights.of(parameters, packed=False)
    requantise(weights, parameters, ops=ops)
    arrays: dict[str, Weight] = {}
    for name, weight in weights.arrays.items():
        if isinstance(weight, BitWeight):
            q_EOI = weight.w.reshape(-1, *weight.w.shape[-2:])
            experts, outputs, inputs = q_EOI.shape
            code = empty_code(experts, outputs, inputs, format)
            packed = PackedMatrices(code, outputs, inputs, format)
            ops.pack_in_place(q_EOI, packed)
            arrays[name] = PackedWeight(packed, weight.beta.reshape(q_EOI.shape[:2]))
        else:
            arrays[name] = weight
    return Weights(parameters.config, arrays)


def _scale_name(entry: Entry) -> str:
    return f"{entry.name}_scale"


def packed_tensors(config: ModelConfig, weights: Weights) -> dict[str, NDArray[Any]]:
    """Every tensor of the file by name, in the table's order."""
    tensors: dict[str, NDArray[Any]] = {}
    for entry in parameter_table(config):
        weight = weights.arrays[entry.name]
        if isinstance(weight, PackedWeight):
            tensors[entry.name] = weight.w.code
            tensors[_scale_name(entry)] = weight.beta.ravel()[matrix_starts(entry)[:-1]]
        else:
            assert isinstance(weight, np.ndarray)
            for part in entry.parts:
                tensors[part.tensor] = weight[part.where]
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


def packed_format(weights: Weights) -> FormatName:
    """The format of packed weights: one for all of them."""
    return next(w.w.format for w in weights.arrays.values() if isinstance(w, PackedWeight))


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


def unpack_weights(config: ModelConfig, weights: Weights, *, ops: Operations) -> Parameters:
    """Float32 parameters that are the same model: quantised again, they give these very weights.

    The weights that once were trained are gone. In their place stand -m, 0 and m with m such that
    mean|W| is the scale beta again (m = beta over the share that is not 0), or -beta and beta.

    Raises UserError: no floats quantise to these weights, so no checkpoint was packed into them.
    """
    parameters = Parameters(config, np.float32)
    for entry in parameters.table:
        weight, target = weights.arrays[entry.name], parameters.arrays[entry.name]
        if not isinstance(weight, PackedWeight):
            target[...] = weight
            continue
        q_OI = unpack(weight.w).reshape(-1, entry.shape[-1]).astype(np.float32)
        beta_O = weight.beta.ravel()
        target_OI = target.reshape(q_OI.shape)
        for first, last in pairwise(matrix_starts(entry)):
            target_OI[first:last] = _floats_of(q_OI[first:last], beta_O[first])
    again = Weights.of(parameters, packed=False)
    requantise(again, parameters, ops=ops)
    for entry in parameters.table:
        weight, quantised = weights.arrays[entry.name], again.arrays[entry.name]
        if isinstance(weight, PackedWeight) and isinstance(quantised, BitWeight):
            same = np.array_equal(unpack(weight.w).ravel(), quantised.w.ravel())
            if not same or not np.array_equal(weight.beta.ravel(), quantised.beta.ravel()):
                raise UserError(f"{entry.name}: no float weights quantise to what is packed here")
    return parameters


def _floats_of(q_OI: FloatArray, beta: np.float32) -> FloatArray:
    """Float32 weights of one matrix whose exact mean magnitude rounds to beta and whose signs are q's.

    One magnitude m for all that is not 0 leaves |mean - beta| up to half a step of m, which may be a
    whole step of beta. Where it rounds to another float, some weights take the next float above m, and
    one that stands for 0 the small rest.
    """
    used = q_OI != 0
    count = int(np.count_nonzero(used))
    if count == 0:
        return q_OI
    wanted = float(beta) * q_OI.size  # exact: 24 bits times the size
    m = np.float32(wanted / count)
    if np.float32(float(m) * count / q_OI.size) == beta:
        return q_OI * m
    if float(m) * count > wanted:
        m = np.nextafter(m, np.float32(0))
    step = float(np.nextafter(m, np.float32(np.inf))) - float(m)
    raised, rest = divmod(wanted - float(m) * count, step)
    w_OI = q_OI * m
    w_OI[used] += (q_OI[used] * np.float32(step)) * (np.arange(count) < raised)
    if count < q_OI.size:
        w_OI.ravel()[np.flatnonzero(~used)[0]] = rest
    return w_OI
