"""Linear maps in tiles, and the embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.compiling import (
    ROWS,
    ROWS_ELEMENTWISE,
    SERIAL_MACS,
    blocks,
    parallel,
    task,
)
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_tn, product_nt
from mhmoe_np.operations.numba_cpu.packed import (
    SERIAL_PACKED_MACS,
    PackedProducts,
    as_packed,
    as_stack,
    packed_tiles,
    padded_inputs,
    project_packed,
    quantise_for,
    quantise_for_all,
)
from mhmoe_np.operations.numba_cpu.quantise import (
    Quantise,
    act_as_quantised,
    scale_block,
    scale_rows,
)
from mhmoe_np.operations.packing import PANEL
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray

MANY_ROWS = 2 * ROWS  # of one tile, where there are enough to share out
COLUMNS = 512  # of one tile, where there are too few rows to share out


def tile(rows: int, columns: int) -> tuple[int, int]:
    """How many rows and columns of the output one task computes."""
    if rows >= 4 * MANY_ROWS:
        return MANY_ROWS, columns
    return ROWS, columns if rows >= 4 * ROWS else min(columns, COLUMNS)


@task
def _bias(y_NO: Any, b_O: Any) -> None:
    for n in range(y_NO.shape[0]):
        for o in range(y_NO.shape[1]):
            y_NO[n, o] += b_O[o]


@parallel
def _linear(x_NI: Any, w_OI: Any, y_NO: Any, rows: int, columns: int) -> None:
    across = (y_NO.shape[1] + columns - 1) // columns
    down = (y_NO.shape[0] + rows - 1) // rows
    for tile in prange(down * across):
        n, o = tile // across * rows, tile % across * columns
        product_nt(x_NI[n : n + rows], w_OI[o : o + columns], y_NO[n : n + rows, o : o + columns])


@task
def _bit_tile(q_NI: Any, w_OI: Any, scale_N: Any, beta_O: Any, y_NO: Any) -> None:
    product_nt(q_NI, w_OI, y_NO)
    scale_block(y_NO, scale_N, beta_O)


@parallel
def _bit_linear(
    q_NI: Any, w_OI: Any, scale_N: Any, beta_O: Any, y_NO: Any, rows: int, columns: int
) -> None:
    across = (y_NO.shape[1] + columns - 1) // columns
    down = (y_NO.shape[0] + rows - 1) // rows
    for tile in prange(down * across):
        n, o = tile // across * rows, tile % across * columns
        _bit_tile(
            q_NI[n : n + rows],
            w_OI[o : o + columns],
            scale_N[n : n + rows],
            beta_O[o : o + columns],
            y_NO[n : n + rows, o : o + columns],
        )


@parallel
def _act_as_quantised(x_NI: Any, x_hat_NI: Any, rows: int) -> None:
    for block in prange((x_NI.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        act_as_quantised(x_NI[n:z], x_hat_NI[n:z])


@parallel
def _scale_rows(w_OI: Any, beta_O: Any, w_hat_OI: Any, rows: int) -> None:
    for block in prange((w_OI.shape[0] + rows - 1) // rows):
        o, z = block * rows, (block + 1) * rows
        scale_rows(w_OI[o:z], beta_O[o:z], w_hat_OI[o:z])


@parallel
def _linear_dx(dy_NO: Any, w_OI: Any, keep: float, dx_NI: Any, rows: int, columns: int) -> None:
    across = (dx_NI.shape[1] + columns - 1) // columns
    down = (dx_NI.shape[0] + rows - 1) // rows
    for tile in prange(down * across):
        n, i = tile // across * rows, tile % across * columns
        gemm_nn(
            1.0,
            dy_NO[n : n + rows],
            w_OI[:, i : i + columns],
            keep,
            dx_NI[n : n + rows, i : i + columns],
        )


@parallel
def _linear_dw(dy_NO: Any, x_NI: Any, dw_OI: Any, outputs: int) -> None:
    for tile in prange((dw_OI.shape[0] + outputs - 1) // outputs):
        o = tile * outputs
        gemm_tn(1.0, dy_NO[:, o : o + outputs], x_NI, 1.0, dw_OI[o : o + outputs])


@task
def _add_rows(dx_ND: Any, id_N: Any, dw_VD: Any) -> None:
    for n in range(len(id_N)):
        for d in range(dx_ND.shape[1]):
            dw_VD[id_N[n], d] += dx_ND[n, d]


class Linear(Quantise, PackedProducts):
    """See `Operations`: linear maps and the embedding."""

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """See `Operations.linear`. In tiles."""
        rows = len(x_NI)
        outputs = w_OI.shape[-2]
        y_NO: FloatArray = self.empty((rows, outputs), x_NI.dtype)
        w_OI = as_packed(w_OI)
        if isinstance(w_OI, PackedWeight):
            self._packed_linear(x_NI, w_OI, y_NO)
        elif isinstance(w_OI, BitWeight):
            self._bit_linear(x_NI, w_OI, y_NO)
        elif x_NI.size * outputs <= SERIAL_MACS:
            product_nt(x_NI, w_OI, y_NO)
        else:
            _linear(x_NI, w_OI, y_NO, *tile(rows, outputs))
        if b_O is not None:
            _bias(y_NO, b_O)
        return y_NO

    def _bit_linear(self, x_NI: FloatArray, w_OI: BitWeight, y_NO: FloatArray) -> None:
        with self.scope():
            q_NI, scale_N = self.quantise_rows(x_NI)
            if y_NO.size * x_NI.shape[1] <= SERIAL_MACS:
                _bit_tile(q_NI, w_OI.w, scale_N, w_OI.beta, y_NO)
            else:
                _bit_linear(q_NI, w_OI.w, scale_N, w_OI.beta, y_NO, *tile(*y_NO.shape))

    def _packed_linear(self, x_NI: FloatArray, w_OI: PackedWeight, y_NO: FloatArray) -> None:
        weight = as_stack(w_OI, self._instruction_set)
        if y_NO.size * x_NI.shape[1] <= SERIAL_PACKED_MACS:
            project_packed(x_NI, weight, 0, y_NO)
            return
        rows = len(x_NI)
        with self.scope():
            q_NI = self.empty((rows, padded_inputs(weight)), np.int8)
            scale_N = self.empty((rows,), x_NI.dtype)
            sum_N = self.empty((rows,), np.int32)
            if rows <= ROWS_ELEMENTWISE:
                quantise_for(weight, x_NI, q_NI, scale_N, sum_N)
            else:
                quantise_for_all(weight, x_NI, q_NI, scale_N, sum_N, ROWS_ELEMENTWISE)
            tile_rows, tile_columns = tile(*y_NO.shape)
            panels = max(1, tile_columns // PANEL)
            packed_tiles(weight, q_NI, scale_N, sum_N, y_NO, tile_rows, panels)

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
        """See `Operations.linear_backward`. dw in strips of outputs."""
        if isinstance(w_OI, PackedWeight):
            raise TypeError("packed weights have no gradient")
        keep = 0.0 if onto_NI is None else 1.0
        dx_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype) if onto_NI is None else onto_NI
        with self.scope():
            if isinstance(w_OI, BitWeight):
                x_NI, w_OI = self._straight_through(x_NI, w_OI)
            if x_NI.size * len(w_OI) <= SERIAL_MACS:
                gemm_nn(1.0, dy_NO, w_OI, keep, dx_NI)
                gemm_tn(1.0, dy_NO, x_NI, 1.0, dw_OI)
            else:
                _linear_dx(dy_NO, w_OI, keep, dx_NI, *tile(*x_NI.shape))
                _linear_dw(dy_NO, x_NI, dw_OI, max(128, blocks(len(w_OI), 8)))
        if db_O is not None:
            db_O += dy_NO.sum(axis=0)
        return dx_NI

    def _straight_through(self, x_NI: FloatArray, w_OI: BitWeight) -> tuple[FloatArray, FloatArray]:
        """What x and w act as."""
        x_hat_NI, w_hat_OI = self.empty(x_NI.shape, x_NI.dtype), self.empty(w_OI.w.shape, x_NI.dtype)
        if len(x_NI) <= ROWS_ELEMENTWISE:
            act_as_quantised(x_NI, x_hat_NI)
            scale_rows(w_OI.w, w_OI.beta, w_hat_OI)
        else:
            _act_as_quantised(x_NI, x_hat_NI, ROWS_ELEMENTWISE)
            _scale_rows(w_OI.w, w_OI.beta, w_hat_OI, ROWS_ELEMENTWISE)
        return x_hat_NI, w_hat_OI

    def embedding(self, id_N: IntArray, w_VD: FloatArray) -> FloatArray:
        """See `Operations.embedding`."""
        x_ND: FloatArray = self.empty((len(id_N), w_VD.shape[1]), w_VD.dtype)
        # With mode="raise", take() would go through a temporary copy; the model has checked the ids.
        return np.take(w_VD, id_N, axis=0, out=x_ND, mode="clip")

    def embedding_backward(self, dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
        """See `Operations.embedding_backward`. One thread: two rows may meet in one place."""
        _add_rows(dx_ND, id_N, dw_VD)
