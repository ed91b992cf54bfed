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


class ByteRows(NamedTuple):
    """Rows of activations in 8 bits."""

    q_NI: Any  # int8, padded with zeros to whole groups of inputs
    scale_N: Any  # gamma/127
    sum_N: Any  # int32: each row's sum of q


@exact
def rows_between(rows: Any, n: Any, end: Any) -> Any:
    """Rows n .. end-1, without a copy."""
    return ByteRows(rows.q_NI[n:end], rows.scale_N[n:end], rows.sum_N[n:end])


@exact
def quantise_to_bytes(x_NI: Any, rows: Any) -> None:
    """Fill `rows`."""
    for n in range(x_NI.shape[0]):
        x_I, q_I = x_NI[n], rows.q_NI[n]
        rows.scale_N[n] = quantise_row(x_I, q_I[: len(x_I)])
        q_I[len(x_I) :] = 0
        total = np.int32(0)
        for i in range(len(x_I)):
            total += np.int32(q_I[i])
        rows.sum_N[n] = total


@exact
def padded_inputs(weight: Any) -> int:
    """The inputs in whole groups."""
    group = _constants(weight).group
    return (weight.inputs + group - 1) // group * group


@exact
def _finish(weight: Any, e: Any, sums: Any, column: Any, columns: Any, rows: Any, y_NO: Any) -> None:
    """y = (lowest * sum q + step * sums) * (beta * gamma/127), `columns` of them from `column` on.

    sums: flat, row by row. A tile may reach beyond the outputs: what is padding there is dropped.
    """
    constants = _constants(weight)
    real = y_NO.dtype.type
    present = min(columns, y_NO.shape[1] - column)
    beta = weight.beta_EO[e, column : column + present]
    for n in range(y_NO.shape[0]):
        base = np.int32(constants.lowest) * rows.sum_N[n]
        scale = rows.scale_N[n]
        sums_of_row = sums[n * columns : n * columns + present]
        y = y_NO[n, column : column + present]
        for c in range(present):
            y[c] = real(base + np.int32(constants.step) * sums_of_row[c]) * (beta[c] * scale)


@exact
def _code_offset(weight: Any, e: Any, v: Any) -> Any:
    """The byte of the code where vector v of matrix e starts."""
    lanes = _constants(weight).lanes
    _, panels, groups, width = weight.code.shape
    halves = PANEL // lanes
    return ((e * panels + v // halves) * groups) * width + v % halves * lanes * PLACES


@exact
def packed_product(
    weight: Any, e: Any, rows: Any, y_NO: Any, first_panel: Any, last_panel: Any
) -> None:
    """y[:, outputs of panels first .. last-1] = (q @ w[e]^T) * (beta * gamma/127).

    Vectors of outputs outside, rows inside: the codes of a tile's vectors stay in the nearest cache
    while all rows pass them. At the end, vectors too few for a tile are taken one by one.
    """
    lanes, across = _constants(weight).lanes, _constants(weight).across
    v, last = first_panel * PANEL // lanes, last_panel * PANEL // lanes
    if len(y_NO) == 1:
        _row_product(weight, e, rows, y_NO, v, last)
        return
    sums = np.empty(MOST_SUMS, np.int32)
    while v < last:
        start = _code_offset(weight, e, v)
        vectors = across if v + across <= last else 1
        n = 0
        while n < len(y_NO):
            end = n + _sum_tile(weight, vectors, rows.q_NI, n, start, sums)
            cut = rows_between(rows, n, end)
            _finish(weight, e, sums, v * lanes, vectors * lanes, cut, y_NO[n:end])
            n = end
        v += vectors


@exact
def _sum_tile(weight: Any, vectors: Any, q_NI: Any, n: Any, start: Any, sums: Any) -> int:
    """Fill `sums` from the largest tile of rows n, n+1, ... that fits; return how many rows it has.

    Every tile unpacks its vectors' codes anew, which takes as many instructions as the products of two
    rows, with base 3 of six. So it has as many rows as the registers hold sums for, while there are so
    many, then 4, 2 and 1. Each size is machine code of its own, hence not every number of rows has one;
    vectors left over are few, and do with two sizes.
    """
    constants, groups, left = _constants(weight), weight.code.shape[2], len(q_NI) - n
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
def _row_product(weight: Any, e: Any, row: Any, y_1O: Any, first: Any, last: Any) -> None:
    """The same for a single row and the vectors first .. last-1; all its sums are finished at once.

    Nothing shares the unpacking, so its tiles have more vectors, and a loop that unpacks less.
    """
    lanes, alone = _constants(weight).lanes, _constants(weight).alone
    groups = weight.code.shape[2]
    sums = np.empty((last - first) * lanes, np.int32)
    v = first
    while v < last:
        start = _code_offset(weight, e, v)
        place = (v - first) * lanes
        if v + alone <= last:
            dot_tile(weight, ALONE, row.q_NI, 0, start, groups, sums[place:])
            v += alone
        else:
            dot_tile(weight, ONE_BY_ONE, row.q_NI, 0, start, groups, sums[place:])
            v += 1
    _finish(weight, e, sums, first * lanes, len(sums), row, y_1O)


@exact
def project_packed(x_NI: Any, weight: Any, e: int, y_NO: Any) -> None:
    """A whole BitLinear on some rows: quantise, multiply, scale."""
    size = len(x_NI)
    rows = ByteRows(
        np.empty((size, padded_inputs(weight)), np.int8),
        np.empty(size, x_NI.dtype),
        np.empty(size, np.int32),
    )
    quantise_to_bytes(x_NI, rows)
    # A literal 0 would be a type of its own and compile everything once more.
    first = np.intp(0)
    packed_product(weight, e, rows, y_NO, first, weight.code.shape[1])
