"""Products with packed weights: int8 rows times packed matrices, exact, then scaled to floats.

A panel of 16 outputs is read once for each tile of rows; sums of integers need no order, so every
instruction set, every tile and any number of threads give the same bits, those of the definition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.extending import overload

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.byte_dot import (
    ALONE,
    FOUR,
    FOUR_BY_ONE,
    MANY,
    MOST_SUMS,
    ONE,
    ONE_BY_ONE,
    TILES,
    TWO,
    dot_tile,
)
from mhmoe_np.operations.numba_cpu.compiling import exact, parallel
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.quantise import quantise_row
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES, FormatName
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight

# One thread is done with so many before a second one has woken up (see `SERIAL_MACS`).
SERIAL_PACKED_MACS = 1 << 22


class Packed(NamedTuple):
    """A stack of packed matrices as compiled code takes it; a subclass says how to read it."""

    code: Any  # [E, panels, groups, 64]
    beta: Any  # [E, O]
    inputs: int


# Compiled code depends on the instruction set and the format: each pair is a type of its own, so that
# one kernel serves them all and none finds another's machine code in the cache. Cached signatures name
# these classes, which must therefore be found by name in this module.
CLASSES: dict[tuple[InstructionSet, FormatName], type[Packed]] = {}
for _set in TILES:
    for _format in FORMATS.values():
        _name = f"Packed_{_set}_{_format.name}".replace("-", "_")
        CLASSES[_set, _format.name] = globals()[_name] = type(
            _name,
            (Packed,),
            {
                "__module__": __name__,
                "__slots__": (),
                "instruction_set": _set,
                "format": _format.name,
            },
        )


def as_packed(weight: Weight) -> Weight:
    """A `BitWeight` in its packed form, if it has one."""
    if isinstance(weight, BitWeight) and weight.packed is not None:
        experts = len(weight.packed.code)
        return PackedWeight(weight.packed, weight.beta.reshape(experts, -1))
    return weight


def as_stack(weight: PackedWeight, instruction_set: InstructionSet) -> Packed:
    """The same arrays, in the class of this instruction set and format."""
    return CLASSES[instruction_set, weight.w.format](weight.w.code, weight.beta, weight.w.inputs)


class PackedProducts(Buffers):
    """What the operations that take packed weights share: the instruction set."""

    def __init__(self, *, keep_buffers: bool, instruction_set: InstructionSet) -> None:
        super().__init__(keep_buffers=keep_buffers)
        self._instruction_set = instruction_set


def _shape_of(weight: Any) -> Any:
    """Constants of a weight's class: lanes, many, across, alone, group, lowest, step."""
    raise NotImplementedError("compiled code only")


@overload(_shape_of)
def _compiled_shape_of(weight: Any) -> Any:
    kind = weight.instance_class
    tiles, format = TILES[kind.instruction_set], FORMATS[kind.format]
    constants = (
        tiles.lanes,
        tiles.many,
        tiles.across,
        tiles.alone[format.name],
        format.group,
        format.lowest,
        format.step,
    )

    def shape_of(weight: Any) -> Any:
        return constants

    return shape_of


@exact
def quantise_for(weight: Any, x_RI: Any, q_RI: Any, scale_R: Any, sum_R: Any) -> None:
    """Quantise rows to int8, padded with zeros to whole groups, with each row's sum."""
    for r in range(x_RI.shape[0]):
        x_I, q_I = x_RI[r], q_RI[r]
        scale_R[r] = quantise_row(x_I, q_I[: len(x_I)])
        q_I[len(x_I) :] = 0
        total = np.int32(0)
        for i in range(len(x_I)):
            total += np.int32(q_I[i])
        sum_R[r] = total


@exact
def padded_inputs(weight: Any) -> int:
    """The inputs in whole groups."""
    group = _shape_of(weight)[4]
    return (weight.inputs + group - 1) // group * group


@exact
def _finish(
    weight: Any,
    e: Any,
    tile: Any,
    rows: Any,
    columns: Any,
    row: Any,
    column: Any,
    scale_R: Any,
    sum_R: Any,
    y_RO: Any,
) -> None:
    """y = (lowest * sum q + step * tile) * (beta * gamma/127) for one tile, without padded outputs."""
    lowest, step = _shape_of(weight)[5], _shape_of(weight)[6]
    real = y_RO.dtype.type
    present = min(columns, y_RO.shape[1] - column)
    for r in range(rows):
        base = np.int32(lowest) * sum_R[row + r]
        scale = scale_R[row + r]
        sums = tile[r * columns : r * columns + present]
        beta = weight.beta[e, column : column + present]
        y = y_RO[row + r, column : column + present]
        for c in range(present):
            y[c] = real(base + np.int32(step) * sums[c]) * (beta[c] * scale)


@exact
def _code_offset(weight: Any, e: Any, v: Any) -> Any:
    """The byte of the code where vector v of matrix e starts."""
    lanes = _shape_of(weight)[0]
    _, panels, groups, width = weight.code.shape
    halves = PANEL // lanes
    return ((e * panels + v // halves) * groups) * width + v % halves * lanes * PLACES


@exact
def packed_product(
    weight: Any,
    e: Any,
    q_RI: Any,
    scale_R: Any,
    sum_R: Any,
    y_RO: Any,
    first_panel: Any,
    last_panel: Any,
) -> None:
    """y[:, outputs of the panels] = (q @ w[e]^T) * (beta * gamma/127)."""
    lanes, many, across, _ = _shape_of(weight)[:4]
    rows, groups = len(q_RI), weight.code.shape[2]
    v, last = first_panel * PANEL // lanes, last_panel * PANEL // lanes
    if rows == 1:
        _row_product(weight, e, q_RI, scale_R, sum_R, y_RO, v, last)
        return
    tile = np.empty(MOST_SUMS, np.int32)
    while v < last:
        start = _code_offset(weight, e, v)
        vectors = across if v + across <= last else 1
        r = 0
        while r < rows:
            left = rows - r
            if vectors < across:
                if left >= 4:
                    dot_tile(weight, FOUR_BY_ONE, q_RI, r, start, groups, tile)
                    done = 4
                else:
                    dot_tile(weight, ONE_BY_ONE, q_RI, r, start, groups, tile)
                    done = 1
            elif left >= many:
                dot_tile(weight, MANY, q_RI, r, start, groups, tile)
                done = many
            elif left >= 4:
                dot_tile(weight, FOUR, q_RI, r, start, groups, tile)
                done = 4
            elif left >= 2:
                dot_tile(weight, TWO, q_RI, r, start, groups, tile)
                done = 2
            else:
                dot_tile(weight, ONE, q_RI, r, start, groups, tile)
                done = 1
            _finish(weight, e, tile, done, vectors * lanes, r, v * lanes, scale_R, sum_R, y_RO)
            r += done
        v += vectors


@exact
def _row_product(
    weight: Any, e: Any, q_1I: Any, scale_1: Any, sum_1: Any, y_1O: Any, first: Any, last: Any
) -> None:
    """The same for a single row and the vectors first .. last-1; all its sums are finished at once."""
    lanes, _, _, alone = _shape_of(weight)[:4]
    groups = weight.code.shape[2]
    sums = np.empty((last - first) * lanes, np.int32)
    v = first
    while v < last:
        start = _code_offset(weight, e, v)
        place = (v - first) * lanes
        if v + alone <= last:
            dot_tile(weight, ALONE, q_1I, 0, start, groups, sums[place:])
            v += alone
        else:
            dot_tile(weight, ONE_BY_ONE, q_1I, 0, start, groups, sums[place:])
            v += 1
    row, rows = np.intp(0), np.intp(1)
    _finish(weight, e, sums, rows, len(sums), row, first * lanes, scale_1, sum_1, y_1O)


@exact
def project_packed(x_RI: Any, weight: Any, e: int, y_RO: Any) -> None:
    """A whole BitLinear on some rows: quantise, multiply, scale."""
    rows = len(x_RI)
    q_RI = np.empty((rows, padded_inputs(weight)), np.int8)
    scale_R, sum_R = np.empty(rows, x_RI.dtype), np.empty(rows, np.int32)
    quantise_for(weight, x_RI, q_RI, scale_R, sum_R)
    # A literal 0 would be a type of its own and compile everything once more.
    first = np.intp(0)
    packed_product(weight, e, q_RI, scale_R, sum_R, y_RO, first, weight.code.shape[1])


@parallel
def quantise_for_all(weight: Any, x_NI: Any, q_NI: Any, scale_N: Any, sum_N: Any, rows: int) -> None:
    """`quantise_for`, a task for each block of rows."""
    for block in prange((x_NI.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        quantise_for(weight, x_NI[n:z], q_NI[n:z], scale_N[n:z], sum_N[n:z])


@parallel
def packed_tiles(
    weight: Any, q_NI: Any, scale_N: Any, sum_N: Any, y_NO: Any, rows: int, panels: int
) -> None:
    """`packed_product` with a single matrix, a task for each block of rows and of panels."""
    across = (weight.code.shape[1] + panels - 1) // panels
    down = (q_NI.shape[0] + rows - 1) // rows
    for tile in prange(down * across):
        n, z = tile // across * rows, (tile // across + 1) * rows
        first = tile % across * panels
        last = min(first + panels, weight.code.shape[1])
        packed_product(weight, np.intp(0), q_NI[n:z], scale_N[n:z], sum_N[n:z], y_NO[n:z], first, last)
