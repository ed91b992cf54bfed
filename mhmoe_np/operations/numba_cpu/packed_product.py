"""Products with packed weights: int8 rows times packed matrices, exact, then scaled to floats.

A panel of 16 outputs is read once for each tile of rows; sums of integers need no order, so every
instruction set, every tile and any number of threads give the same bits, those of the definition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from mhmoe_np.operations.numba_cpu.byte_dot import dot_tile
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.quantise import quantise_row
from mhmoe_np.operations.numba_cpu.tiles import (
    ALONE,
    FOUR,
    FOUR_BY_ONE,
    MANY,
    MOST_SUMS,
    ONE,
    ONE_BY_ONE,
    TILES,
    TWO,
)
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES

# One thread is done with so many before a second one has woken up (see `SERIAL_MACS`).
SERIAL_PACKED_MACS = 1 << 22


class _Constants(NamedTuple):
    """What a class of packed weights fixes in the code: see `Tiles` and `PackingFormat`."""

    lanes: int
    many: int
    across: int
    alone: int
    group: int
    lowest: int
    step: int


def _constants(weight: Any) -> _Constants:
    """Those of a weight's class."""
    raise NotImplementedError("compiled code only")


@overload(_constants)
def _compiled_constants(weight: Any) -> Any:
    kind = weight.instance_class
    tiles, format = TILES[kind.instruction_set], FORMATS[kind.format]
    constants = _Constants(
        lanes=tiles.lanes,
        many=tiles.many,
        across=tiles.across,
        alone=tiles.alone[format.name],
        group=format.group,
        lowest=format.lowest,
        step=format.step,
    )

    def of_its_class(weight: Any) -> Any:
        return constants

    return of_its_class


@exact
def quantise_to_bytes(x_NI: Any, q_NI: Any, scale_N: Any, sum_N: Any) -> None:
    """Quantise rows to int8, padded with zeros to whole groups of inputs, with each row's sum."""
    for n in range(x_NI.shape[0]):
        x_I, q_I = x_NI[n], q_NI[n]
        scale_N[n] = quantise_row(x_I, q_I[: len(x_I)])
        q_I[len(x_I) :] = 0
        total = np.int32(0)
        for i in range(len(x_I)):
            total += np.int32(q_I[i])
        sum_N[n] = total


@exact
def padded_inputs(weight: Any) -> int:
    """The inputs in whole groups."""
    group = _constants(weight).group
    return (weight.inputs + group - 1) // group * group


class PackedProduct(NamedTuple):
    """y = (q @ w[e]^T) * (beta * gamma/127) on some rows."""

    weight: Any
    e: Any
    q_NI: Any  # int8, padded with zeros to whole groups
    scale_N: Any  # gamma/127
    sum_N: Any  # int32, of each row of q
    y_NO: Any  # written


@exact
def packed_product(a: Any, first_panel: Any, last_panel: Any) -> None:
    """The product's outputs of panels first .. last-1.

    Vectors of outputs outside, rows inside: the codes of a tile's vectors stay in the nearest cache
    while all rows pass them. At the end, vectors too few for a tile are taken one by one.
    """
    lanes, across = _constants(a.weight).lanes, _constants(a.weight).across
    v, last = first_panel * PANEL // lanes, last_panel * PANEL // lanes
    rows = len(a.y_NO)
    if rows == 1:
        _row_product(a, v, last)
        return
    sums = np.empty(MOST_SUMS, np.int32)
    while v < last:
        start = _code_offset(a.weight, a.e, v)
        vectors = across if v + across <= last else 1
        n = np.intp(0)  # a literal 0 would be a type of its own and compile what follows once more
        while n < rows:
            end = n + _sum_tile(a, vectors, n, start, sums)
            _finish(a, sums, n, end, v * lanes, vectors * lanes)
            n = end
        v += vectors


@exact
def _code_offset(weight: Any, e: Any, v: Any) -> Any:
    """The byte of the code where vector v of matrix e starts."""
    lanes = _constants(weight).lanes
    _, panels, groups, width = weight.code.shape
    halves = PANEL // lanes
    return ((e * panels + v // halves) * groups) * width + v % halves * lanes * PLACES


@exact
def _sum_tile(a: Any, vectors: Any, n: Any, start: Any, sums: Any) -> int:
    """Fill `sums` from the largest tile of rows n, n+1, ... that fits; return how many rows it has.

    Every tile unpacks its vectors' codes anew, which takes as many instructions as the products of two
    rows, with base 3 of six. So it has as many rows as the registers hold sums for, while there are so
    many, then 4, 2 and 1. Each size is machine code of its own, hence not every number of rows has one;
    vectors left over are few, and do with two sizes.
    """
    weight, q_NI, groups = a.weight, a.q_NI, a.weight.code.shape[2]
    constants, left = _constants(weight), len(a.y_NO) - n
    if vectors < constants.across:
        if left >= 4:
            dot_tile(weight, FOUR_BY_ONE, q_NI, n, start, groups, sums)
            return 4
        dot_tile(weight, ONE_BY_ONE, q_NI, n, start, groups, sums)
        return 1
    if left >= constants.many:
        dot_tile(weight, MANY, q_NI, n, start, groups, sums)
        return constants.many
    if left >= 4:
        dot_tile(weight, FOUR, q_NI, n, start, groups, sums)
        return 4
    if left >= 2:
        dot_tile(weight, TWO, q_NI, n, start, groups, sums)
        return 2
    dot_tile(weight, ONE, q_NI, n, start, groups, sums)
    return 1


@exact
def _row_product(a: Any, first: Any, last: Any) -> None:
    """The same for a single row and the vectors first .. last-1; all its sums are finished at once.

    Nothing shares the unpacking, so its tiles have more vectors, and a loop that unpacks less.
    """
    weight, q_1I, groups = a.weight, a.q_NI, a.weight.code.shape[2]
    lanes, alone = _constants(weight).lanes, _constants(weight).alone
    sums = np.empty((last - first) * lanes, np.int32)
    v = first
    while v < last:
        start = _code_offset(weight, a.e, v)
        place = (v - first) * lanes
        if v + alone <= last:
            dot_tile(weight, ALONE, q_1I, 0, start, groups, sums[place:])
            v += alone
        else:
            dot_tile(weight, ONE_BY_ONE, q_1I, 0, start, groups, sums[place:])
            v += 1
    _finish(a, sums, np.intp(0), np.intp(1), first * lanes, len(sums))


@exact
def _finish(a: Any, sums: Any, n: Any, end: Any, column: Any, columns: Any) -> None:
    """y = (lowest * sum q + step * sums) * (beta * gamma/127) for rows n .. end-1.

    sums: flat, row by row, `columns` of them from `column` on. What reaches beyond the outputs is
    padding, and dropped.
    """
    constants = _constants(a.weight)
    real = a.y_NO.dtype.type
    present = min(columns, a.y_NO.shape[1] - column)
    beta_O = a.weight.beta_EO[a.e, column : column + present]
    for row in range(n, end):
        base = np.int32(constants.lowest) * a.sum_N[row]
        scale = a.scale_N[row]
        first = (row - n) * columns
        sums_O = sums[first : first + present]
        y_O = a.y_NO[row, column : column + present]
        for o in range(present):
            y_O[o] = real(base + np.int32(constants.step) * sums_O[o]) * (beta_O[o] * scale)


@exact
def project_packed(x_NI: Any, weight: Any, e: int, y_NO: Any) -> None:
    """A whole BitLinear on some rows: quantise, multiply, scale."""
    rows = len(x_NI)
    q_NI = np.empty((rows, padded_inputs(weight)), np.int8)
    scale_N, sum_N = np.empty(rows, x_NI.dtype), np.empty(rows, np.int32)
    quantise_to_bytes(x_NI, q_NI, scale_N, sum_N)
    first = np.intp(0)  # not a literal, as above
    packed_product(PackedProduct(weight, e, q_NI, scale_N, sum_N, y_NO), first, weight.code.shape[1])
