"""Linear maps in tiles, and the embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.numba_cpu.bfloat16_linear import BFloat16Linear
from mhmoe_np.operations.numba_cpu.compiling import exact, task
from mhmoe_np.operations.numba_cpu.gemm import FEW_ROWS, gemm_nn, gemm_tn, product_nt
from mhmoe_np.operations.numba_cpu.int8_linear import Int8Linear
from mhmoe_np.operations.numba_cpu.packed import as_packed, as_stack
from mhmoe_np.operations.numba_cpu.packed_product import (
    SERIAL_PACKED_MACS,
    PackedProduct,
    packed_product,
    padded_inputs,
    project_packed,
    quantise_to_bytes,
)
from mhmoe_np.operations.numba_cpu.quantise import (
    QuantiseRows,
    act_as_quantised,
    scale_block,
    scale_rows,
)
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS,
    ROWS_ELEMENTWISE,
    block,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.operations.packing import PANEL
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray

MANY_ROWS = 2 * ROWS  # of one tile, where there are enough to share out
COLUMNS = 512  # of one tile, where there are too few rows to share out
FEW_ROWS_COLUMNS = 64  # of one tile where nothing but reading the weights takes time


def tiles_of(rows: int, columns: int) -> tuple[int, int, int]:
    """Height and width of the tiles in which an output is computed, a task each, and their number.

    The last ones of rows and columns may be smaller.
    """
    if rows <= ROWS and columns <= COLUMNS:
        return rows, columns, 1
    height, width = ROWS, columns
    if rows >= 4 * MANY_ROWS:
        height = MANY_ROWS
    elif rows < 4 * ROWS:
        width = min(columns, COLUMNS)
    return height, width, blocks(rows, height) * blocks(columns, width)


def product_tiles_of(rows: int, columns: int) -> tuple[int, int, int]:
    """The same for `product_nt`, which reads the weights of few rows at any width as fast."""
    if rows <= FEW_ROWS:
        return rows, FEW_ROWS_COLUMNS, blocks(columns, FEW_ROWS_COLUMNS)
    return tiles_of(rows, columns)


@exact
def _tile(i: int, height: int, width: int, columns: int) -> Any:
    """Rows and columns of tile number i, as slices, in an output of so many columns."""
    across = blocks(columns, width)
    return block(i // across, height), block(i % across, width)


@task
def _add_bias(y_NO: Any, b_O: Any) -> None:
    for n in range(y_NO.shape[0]):
        for o in range(y_NO.shape[1]):
            y_NO[n, o] += b_O[o]


class FloatTiles(NamedTuple):
    """y = x @ w^T, a tile a task."""

    x_NI: Any
    w_OI: Any
    y_NO: Any  # written
    height: int
    width: int


@tasks_of(FloatTiles)
def _float_tile(i: int, a: Any) -> None:
    rows, columns = _tile(i, a.height, a.width, a.y_NO.shape[1])
    product_nt(a.x_NI[rows], a.w_OI[columns], a.y_NO[rows, columns])


class BitTiles(NamedTuple):
    """The same of integers kept as floats: y = (q @ w^T) * (beta * gamma/127)."""

    q_NI: Any
    w_OI: Any
    scale_N: Any  # gamma/127
    beta_O: Any
    y_NO: Any  # written
    height: int
    width: int


@tasks_of(BitTiles)
def _bit_tile(i: int, a: Any) -> None:
    rows, columns = _tile(i, a.height, a.width, a.y_NO.shape[1])
    y_NO = a.y_NO[rows, columns]
    product_nt(a.q_NI[rows], a.w_OI[columns], y_NO)
    scale_block(y_NO, a.scale_N[rows], a.beta_O[columns])


class RowsToBytes(NamedTuple):
    """Rows to quantise for `PackedTiles`, a block a task."""

    x_NI: Any
    q_NI: Any  # written, like what follows
    scale_N: Any
    sum_N: Any


@tasks_of(RowsToBytes, exact)
def _rows_to_bytes(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    quantise_to_bytes(a.x_NI[rows], a.q_NI[rows], a.scale_N[rows], a.sum_N[rows])


class PackedTiles(NamedTuple):
    """The same as `BitTiles` of packed integers, a stack of one matrix."""

    weight: Any
    q_NI: Any  # int8, padded with zeros to whole groups
    scale_N: Any  # gamma/127
    sum_N: Any  # of each row of q
    y_NO: Any  # written
    height: int
    width: int  # whole panels


@tasks_of(PackedTiles, exact)
def _packed_tile(i: int, a: Any) -> None:
    panels = a.weight.code.shape[1]
    rows, columns = _tile(i, a.height, a.width, panels * PANEL)
    scale_N, sum_N, y_NO = a.scale_N[rows], a.sum_N[rows], a.y_NO[rows]
    product = PackedProduct(a.weight, np.intp(0), a.q_NI[rows], scale_N, sum_N, y_NO)
    packed_product(product, columns.start // PANEL, min(columns.stop // PANEL, panels))


class InputGradient(NamedTuple):
    """dx = dy @ w, or dx += dy @ w, a tile a task."""

    dy_NO: Any
    w_OI: Any
    dx_NI: Any
    onto: bool  # add to dx; otherwise it may hold anything
    height: int
    width: int


@tasks_of(InputGradient)
def _input_gradient(i: int, a: Any) -> None:
    rows, columns = _tile(i, a.height, a.width, a.dx_NI.shape[1])
    beta = 1.0 if a.onto else 0.0
    gemm_nn(1.0, a.dy_NO[rows], a.w_OI[:, columns], beta, a.dx_NI[rows, columns])


class WeightGradient(NamedTuple):
    """dw += dy^T @ x, a strip of outputs a task."""

    dy_NO: Any
    x_NI: Any
    dw_OI: Any  # added to
    outputs: int  # of one strip


@tasks_of(WeightGradient)
def _weight_gradient(i: int, a: Any) -> None:
    strip = block(i, a.outputs)
    gemm_tn(1.0, a.dy_NO[:, strip], a.x_NI, 1.0, a.dw_OI[strip])


class ActingRows(NamedTuple):
    """What a BitLinear's input acts as, a block of rows a task."""

    x_NI: Any
    x_hat_NI: Any  # written


@tasks_of(ActingRows, exact)
def _acting_rows(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    act_as_quantised(a.x_NI[rows], a.x_hat_NI[rows])


class ActingWeights(NamedTuple):
    """What a BitLinear's weight acts as, a block of outputs a task."""

    w_OI: Any
    beta_O: Any
    w_hat_OI: Any  # written


@tasks_of(ActingWeights, exact)
def _acting_weights(i: int, a: Any) -> None:
    outputs = block(i, ROWS_ELEMENTWISE)
    scale_rows(a.w_OI[outputs], a.beta_O[outputs], a.w_hat_OI[outputs])


@task
def _add_rows(dx_ND: Any, id_N: Any, dw_VD: Any) -> None:
    for n in range(len(id_N)):
        for d in range(dx_ND.shape[1]):
            dw_VD[id_N[n], d] += dx_ND[n, d]


class Linear(QuantiseRows, Int8Linear, BFloat16Linear):
    """See `Operations`: linear maps and the embedding."""

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """See `Operations.linear`."""
        weight = as_packed(w_OI)
        y_NO: FloatArray = self.empty((len(x_NI), w_OI.shape[-2]), x_NI.dtype)
        if isinstance(weight, PackedWeight):
            self._packed_linear(x_NI, weight, y_NO)
        elif isinstance(weight, BitWeight):
            self._bit_linear(x_NI, weight, y_NO)
        elif isinstance(weight, Int8Weight):
            self.int8_linear(x_NI, weight, y_NO)
        elif isinstance(weight, BFloat16Weight):
            self.bfloat16_linear(x_NI, weight, y_NO)
        else:
            height, width, tiles = product_tiles_of(*y_NO.shape)
            product = FloatTiles(x_NI, weight, y_NO, height, width)
            run(product, tiles, macs=y_NO.size * x_NI.shape[1])
        if b_O is not None:
            _add_bias(y_NO, b_O)
        return y_NO

    def _bit_linear(self, x_NI: FloatArray, weight: BitWeight, y_NO: FloatArray) -> None:
        """In floats, which hold every sum of its integers exactly."""
        with self.scope():
            q_NI, scale_N = self.quantise_rows(x_NI)
            height, width, tiles = product_tiles_of(*y_NO.shape)
            product = BitTiles(q_NI, weight.w, scale_N, weight.beta, y_NO, height, width)
            run(product, tiles, macs=y_NO.size * x_NI.shape[1])

    def _packed_linear(self, x_NI: FloatArray, weight: PackedWeight, y_NO: FloatArray) -> None:
        """In two regions, but small products in one call: each token that is decoded has dozens."""
        stack = as_stack(weight, self._instruction_set)
        macs = y_NO.size * x_NI.shape[1]
        if macs <= SERIAL_PACKED_MACS:
            project_packed(x_NI, stack, 0, y_NO)
            return
        rows = len(x_NI)
        with self.scope():
            q_NI = self.empty((rows, padded_inputs(stack)), np.int8)
            scale_N, sum_N = self.empty((rows,), x_NI.dtype), self.empty((rows,), np.int32)
            to_bytes = RowsToBytes(x_NI, q_NI, scale_N, sum_N)
            run(to_bytes, blocks(rows, ROWS_ELEMENTWISE), macs=x_NI.size * ELEMENT_MACS)
            height, width, tiles = tiles_of(rows, blocks(y_NO.shape[1], PANEL) * PANEL)
            product = PackedTiles(stack, q_NI, scale_N, sum_N, y_NO, height, width)
            run(product, tiles, macs=macs, serial=SERIAL_PACKED_MACS)

    def linear_backward(
        self,
        dy_NO: FloatArray,
        x_NI: FloatArray,
        w_OI: Weight,
        dw_OI: FloatArray,
        db_O: FloatArray | None,
        *,
        onto_NI: FloatArray | None = None,
    ) -> FloatArray:
        """See `Operations.linear_backward`."""
        if isinstance(w_OI, PackedWeight | Int8Weight | BFloat16Weight):
            raise TypeError("packed weights have no gradient")
        dx_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype) if onto_NI is None else onto_NI
        with self.scope():
            if isinstance(w_OI, BitWeight):
                x_NI, w_OI = self._straight_through(x_NI, w_OI)
            macs = dy_NO.size * x_NI.shape[1]
            height, width, tiles = tiles_of(*dx_NI.shape)
            to_input = InputGradient(dy_NO, w_OI, dx_NI, onto_NI is not None, height, width)
            run(to_input, tiles, macs=macs)
            strip = max(128, blocks(len(w_OI), 8))
            run(WeightGradient(dy_NO, x_NI, dw_OI, strip), blocks(len(w_OI), strip), macs=macs)
        if db_O is not None:
            db_O += dy_NO.sum(axis=0)
        return dx_NI

    def _straight_through(self, x_NI: FloatArray, w_OI: BitWeight) -> tuple[FloatArray, FloatArray]:
        """What x and w act as."""
        x_hat_NI, w_hat_OI = self.empty(x_NI.shape, x_NI.dtype), self.empty(w_OI.w.shape, x_NI.dtype)
        rows = blocks(len(x_NI), ROWS_ELEMENTWISE)
        run(ActingRows(x_NI, x_hat_NI), rows, macs=x_NI.size * ELEMENT_MACS)
        outputs = blocks(len(w_hat_OI), ROWS_ELEMENTWISE)
        acting = ActingWeights(w_OI.w, w_OI.beta, w_hat_OI)
        run(acting, outputs, macs=w_hat_OI.size * ELEMENT_MACS)
        return x_hat_NI, w_hat_OI

    def embedding(self, id_N: IntArray, w_VD: FloatArray) -> FloatArray:
        """See `Operations.embedding`."""
        x_ND: FloatArray = self.empty((len(id_N), w_VD.shape[1]), w_VD.dtype)
        # With mode="raise", take() would go through a temporary copy. No id can be outside here: the
        # model refuses such ids on the host, before any operation sees them.
        return np.take(w_VD, id_N, axis=0, out=x_ND, mode="clip")

    def embedding_backward(self, dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
        """See `Operations.embedding_backward`. One thread: two rows may meet in one place."""
        _add_rows(dx_ND, id_N, dw_VD)
