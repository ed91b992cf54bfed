"""Float32 products of our own, with BLAS's signature: c = alpha op(a) op(b) + beta c, on one thread.

They follow Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3)):
the second factor is copied, some hundred inputs at a time, into panels that the first-level cache
holds, and every panel meets a block of rows that the second-level cache holds. But the first factor
is copied only where it lies transposed: else a tile reads its rows as they are. In a library these
copies take a sixth of a training step, whose products are small [D25].

A number of c is a sum input by input in one order: its bits depend on the number of inputs alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.float_tile import (
    AS_THEY_LIE,
    COLUMNS,
    COPIED,
    LANES,
    NUMBER,
    PIECE,
    ROWS,
    VECTORS,
    copy_number,
    copy_vector,
    multiply_tile,
    turn_piece,
)
from mhmoe_np.operations.numba_cpu.instruction_set import features
from mhmoe_np.operations.numba_cpu.kernel_cache import keep
from mhmoe_np.operations.numba_cpu.regions import blocks

NEEDED = {"avx2", "fma"}
ARCHITECTURE = "AVX-512" if LANES == 16 else "AVX2"

INPUTS = 384  # of a panel: 24 KB of first-level cache, or with AVX-512 48 KB
BLOCK_ROWS = 120  # whole tiles; with INPUTS of them at most 180 KB of second-level cache
BLOCK_COLUMNS = 1024  # whose panels are kept for all blocks of rows
CACHE_LINE = 64
PANEL_BYTES = INPUTS * COLUMNS * NUMBER
# Of the rows of a tile, where they are copied. Powers of two would give all tiles one place in a cache.
TILE_BYTES = INPUTS * LANES * NUMBER + CACHE_LINE


def available() -> bool:
    """Whether this processor has the instructions that make these products fast."""
    return features() >= NEEDED


@exact
def _copy_numbers(
    source: int, input_step: int, step: int, first: int, end: int, count: int, target: int, width: int
) -> None:
    """`count` numbers of each input from `first` to before `end`, one by one, to rows of `width`."""
    for i in range(first, end):
        for j in range(count):
            copy_number(source + i * input_step + j * step, target + (i * width + j) * NUMBER)


@exact
def _fill_panel(transposed: bool, b: int, b_step: int, inputs: int, columns: int, panel: int) -> None:
    """The next `inputs` of some columns of op(b), those of each input side by side."""
    input_step, column_step = (NUMBER, b_step) if transposed else (b_step, NUMBER)
    done = 0
    if columns == COLUMNS and transposed:
        done = inputs // PIECE * PIECE
        for i in range(0, done, PIECE):
            for v in range(VECTORS):
                target = panel + (i * COLUMNS + v * LANES) * NUMBER
                turn_piece(b + v * LANES * b_step + i * NUMBER, b_step, target)
    elif columns == COLUMNS:
        done = inputs
        for i in range(inputs):
            for v in range(VECTORS):
                beside = v * LANES * NUMBER
                copy_vector(b + i * b_step + beside, panel + i * COLUMNS * NUMBER + beside)
    _copy_numbers(b, input_step, column_step, done, inputs, columns, panel, COLUMNS)


@exact
def _fill_tiles(a: int, a_step: int, inputs: int, rows: int, left: int, tiles: int) -> None:
    """The next `inputs` of a block of `rows` rows of a transposed, those of each tile side by side.

    left: rows up to the end of a. Where a whole vector of them is, more than a tile's are copied. Every
    input's rows are read as they lie: tile by tile, the processor would forget a line of its cache
    before the next tile takes more of it.
    """
    tiles_of_vectors = blocks(max(0, min(rows, left - LANES + 1)), ROWS)
    for i in range(inputs):
        source, target = a + i * a_step, tiles + i * LANES * NUMBER
        for tile in range(tiles_of_vectors):
            copy_vector(source + tile * ROWS * NUMBER, target + tile * TILE_BYTES)
    for tile in range(tiles_of_vectors, blocks(rows, ROWS)):
        first, target = tile * ROWS, tiles + tile * TILE_BYTES
        _copy_numbers(
            a + first * NUMBER, a_step, NUMBER, 0, inputs, min(ROWS, rows - first), target, LANES
        )


@exact
def _aligned(address: int) -> int:
    """The next cache line."""
    return (address + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@exact
def _multiply(
    transposed_a: bool, transposed_b: bool, rows: int, columns: int, inputs: int,
    alpha: Any, a: int, a_step: int, b: int, b_step: int, beta: Any, c: int, c_step: int,
    rows_room: Any, panels_room: Any,
) -> None:  # fmt: skip
    """The product, in the room that is given for copies."""
    tiles = _aligned(rows_room.ctypes.data)
    panels = _aligned(panels_room.ctypes.data)
    one_panel = rows <= BLOCK_ROWS
    depth = PIECE * blocks(blocks(inputs, max(1, blocks(inputs, INPUTS))), PIECE)
    for first_column in range(0, columns, BLOCK_COLUMNS):
        end_column = min(columns, first_column + BLOCK_COLUMNS)
        for first in range(0, max(inputs, 1), max(depth, 1)):
            count = min(depth, inputs - first)
            factor = beta if first == 0 else np.float32(1)
            for first_row in range(0, rows, BLOCK_ROWS):
                end_row = min(rows, first_row + BLOCK_ROWS)
                if transposed_a:
                    start = a + first * a_step + first_row * NUMBER
                    _fill_tiles(start, a_step, count, end_row - first_row, rows - first_row, tiles)
                for column in range(first_column, end_column, COLUMNS):
                    across = min(COLUMNS, columns - column)
                    panel = panels
                    if not one_panel:
                        panel += (column - first_column) // COLUMNS * PANEL_BYTES
                    if first_row == 0:
                        start = b + (
                            column * b_step + first * NUMBER
                            if transposed_b
                            else first * b_step + column * NUMBER
                        )
                        _fill_panel(transposed_b, start, b_step, count, across, panel)
                    for row in range(first_row, end_row, ROWS):
                        there = c + row * c_step + column * NUMBER
                        left = min(ROWS, rows - row)
                        if transposed_a:
                            room = tiles + (row - first_row) // ROWS * TILE_BYTES
                            multiply_tile(
                                COPIED, room, 0, left, count, panel, there, c_step, across,
                                alpha, factor,
                            )  # fmt: skip
                        else:
                            start = a + row * a_step + first * NUMBER
                            multiply_tile(
                                AS_THEY_LIE, start, a_step, left, count, panel, there, c_step, across,
                                alpha, factor,
                            )  # fmt: skip


def _sgemm(
    trans_b: Any, trans_a: Any, columns: Any, rows: Any, inputs: Any,
    alpha: Any, b: int, b_step: Any, a: int, a_step: Any, beta: Any, c: int, c_step: Any,
) -> None:  # fmt: skip
    """BLAS's call, every argument by its address: to it our rows are columns, and b comes first."""
    tiles = blocks(min(rows[0], BLOCK_ROWS), ROWS) if trans_a[0] == TRANSPOSED else 0
    panels = blocks(min(columns[0], BLOCK_COLUMNS), COLUMNS) if rows[0] > BLOCK_ROWS else 1
    _multiply(
        trans_a[0] == TRANSPOSED, trans_b[0] == TRANSPOSED, rows[0], columns[0], inputs[0],
        alpha[0], a, a_step[0] * NUMBER, b, b_step[0] * NUMBER, beta[0], c, c_step[0] * NUMBER,
        np.empty(tiles * TILE_BYTES + CACHE_LINE, np.uint8),
        np.empty(panels * PANEL_BYTES + CACHE_LINE, np.uint8),
    )  # fmt: skip


TRANSPOSED = ord("t")
_LETTER, _SIZE, _FACTOR = (
    types.CPointer(kind)  # type: ignore[no-untyped-call]
    for kind in (types.uint8, types.int64, types.float32)
)
_SIGNATURE = types.void(
    _LETTER, _LETTER, _SIZE, _SIZE, _SIZE,
    _FACTOR, types.int64, _SIZE, types.int64, _SIZE, _FACTOR, types.int64, _SIZE,
)  # fmt: skip


@cache
def sgemm_address() -> int:
    """Where the compiled function begins; sizes are of 64 bits."""
    signature = _SIGNATURE.args, _SIGNATURE.return_type
    function: Any = CFunc(_sgemm, signature, locals={}, options={"error_model": "numpy"})
    keep(function)
    function.compile()
    return int(function.address)
