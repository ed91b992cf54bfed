"""Linear maps with 8-bit weights: in one call where they are small, else shared out by tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.int8 import BLOCK, Int8Weight
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.int8_product import (
    Int8Product,
    as_int8_stack,
    int8_product,
    project_int8,
    quantise_to_int8,
)
from mhmoe_np.operations.numba_cpu.packed import PackedProducts
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS,
    ROWS_ELEMENTWISE,
    block,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.types import FloatArray

PANELS = 16  # of one task
# One thread is done with so many before a second one has woken up (see `SERIAL_MACS`).
SERIAL_INT8_MACS = 1 << 20


class RowsToInt8(NamedTuple):
    """Rows to quantise, a block of them a task."""

    x_NI: Any
    q: Any  # written, like what follows: see `quantise_to_int8`
    scale: Any
    correction: Any


@tasks_of(RowsToInt8, exact)
def _rows_to_int8(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    quantise_to_int8(a.x_NI[rows], a.q[rows], a.scale[rows], a.correction[rows])


class Int8Tiles(NamedTuple):
    """The product, some rows and panels a task."""

    weight: Any  # a stack of one matrix
    q: Any
    scale: Any
    correction: Any
    y_NO: Any  # written


@tasks_of(Int8Tiles, exact)
def _int8_tile(i: int, a: Any) -> None:
    panels = a.weight.q.shape[1]
    across = blocks(panels, PANELS)
    rows, first = block(i // across, ROWS), i % across * PANELS
    scale, correction, y_NO = a.scale[rows], a.correction[rows], a.y_NO[rows]
    product = Int8Product(a.weight, np.intp(0), a.q[rows], scale, correction, y_NO)
    int8_product(product, first, min(first + PANELS, panels))


class Int8Linear(PackedProducts):
    """Linear maps with an `Int8Weight`."""

    def int8_linear(self, x_NI: FloatArray, w_OI: Int8Weight, y_NO: FloatArray) -> None:
        """Overwrite y_NO by the product."""
        stack = as_int8_stack(w_OI, self._instruction_set)
        macs = y_NO.size * x_NI.shape[1]
        if macs <= SERIAL_INT8_MACS:
            project_int8(x_NI, stack, np.intp(0), y_NO)
            return
        rows, (_, panels, width, _) = len(x_NI), w_OI.scale.shape
        with self.scope():
            q = self.empty((rows, width * BLOCK), np.int8)
            scale = self.empty((rows, width), x_NI.dtype)
            correction = self.empty((rows, width), np.int32)
            to_int8 = RowsToInt8(x_NI, q, scale, correction)
            run(to_int8, blocks(rows, ROWS_ELEMENTWISE), macs=x_NI.size * ELEMENT_MACS)
            tasks = blocks(rows, ROWS) * blocks(panels, PANELS)
            run(Int8Tiles(stack, q, scale, correction, y_NO), tasks, macs=macs, serial=SERIAL_INT8_MACS)
