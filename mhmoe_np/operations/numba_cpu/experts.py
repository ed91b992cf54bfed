"""The experts: one parallel region over (expert, block of its rows), single-threaded BLAS inside.

Each task gathers its rows, runs both projections in one product, the activation, and the way down;
a second region sums the rows of each sub-token. In the backward the weight gradients have a region of
their own, one task an expert's matrix, so nothing is added from two places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import (
    ROWS,
    ROWS_ELEMENTWISE,
    SERIAL_MACS,
    parallel,
    task,
)
from mhmoe_np.operations.numba_cpu.feed_forward import activate_rows, activate_rows_backward
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.operations.numba_cpu.norm import norm_rows, norm_rows_backward
from mhmoe_np.operations.table import Activation, Dispatch, ExpertCache
from mhmoe_np.types import FloatArray, IntArray


@task
def _row_blocks(start_Z: Any, rows: int) -> Any:
    """[expert, first row, last row + 1] of each task."""
    count = 0
    for e in range(len(start_Z) - 1):
        count += (start_Z[e + 1] - start_Z[e] + rows - 1) // rows
    blocks = np.empty((count, 3), np.int64)
    i = 0
    for e in range(len(start_Z) - 1):
        for first in range(start_Z[e], start_Z[e + 1], rows):
            blocks[i, 0], blocks[i, 1] = e, first
            blocks[i, 2] = min(first + rows, start_Z[e + 1])
            i += 1
    return blocks


@task
def _gather(x_MU: Any, route_R: Any, K: int) -> Any:
    out_RU = np.empty((len(route_R), x_MU.shape[1]), x_MU.dtype)
    for r in range(len(route_R)):
        x_U, out_U = x_MU[route_R[r] // K], out_RU[r]
        for u in range(len(out_U)):
            out_U[u] = x_U[u]
    return out_RU


@task
def _expert_rows(
    x_MU: Any,
    K: int,
    route_R: Any,
    gate_up_2FU: Any,
    down_UF: Any,
    sub_norm_F: Any,
    silu: bool,
    eps: float,
    gate_up_R2F: Any,
    rstd_R: Any,
    y_RU: Any,
) -> None:
    x_RU = _gather(x_MU, route_R, K)
    gemm_nt(1.0, x_RU, gate_up_2FU, 0.0, gate_up_R2F)
    h_RF = np.empty((len(route_R), down_UF.shape[1]), x_MU.dtype)
    activate_rows(gate_up_R2F, silu, h_RF)
    if len(sub_norm_F) > 0:
        norm_rows(h_RF, sub_norm_F, eps, h_RF, rstd_R)
    gemm_nt(1.0, h_RF, down_UF, 0.0, y_RU)


@task
def _expert_task(
    i: int,
    blocks: Any,
    x_MU: Any,
    K: int,
    route_R: Any,
    gate_up_E2FU: Any,
    down_EUF: Any,
    sub_norm_EF: Any,
    silu: bool,
    eps: float,
    gate_up_R2F: Any,
    rstd_R: Any,
    y_RU: Any,
) -> None:
    e, r, z = blocks[i, 0], blocks[i, 1], blocks[i, 2]
    _expert_rows(
        x_MU,
        K,
        route_R[r:z],
        gate_up_E2FU[e],
        down_EUF[e],
        sub_norm_EF[e],
        silu,
        eps,
        gate_up_R2F[r:z],
        rstd_R[r:z],
        y_RU[r:z],
    )


@parallel
def _experts(
    blocks: Any,
    x_MU: Any,
    K: int,
    route_R: Any,
    gate_up_E2FU: Any,
    down_EUF: Any,
    sub_norm_EF: Any,
    silu: bool,
    eps: float,
    gate_up_R2F: Any,
    rstd_R: Any,
    y_RU: Any,
) -> None:
    for i in prange(blocks.shape[0]):
        _expert_task(
            i,
            blocks,
            x_MU,
            K,
            route_R,
            gate_up_E2FU,
            down_EUF,
            sub_norm_EF,
            silu,
            eps,
            gate_up_R2F,
            rstd_R,
            y_RU,
        )


@task
def _combine_rows(y_RU: Any, gate_MK: Any, slot_MK: Any, y_MU: Any) -> None:
    """y[m] = sum_j gate[m, j] * row[slot[m, j]]."""
    for m in range(y_MU.shape[0]):
        y_U = y_MU[m]
        y_U[:] = 0
        for j in range(slot_MK.shape[1]):
            if slot_MK[m, j] >= 0:
                row_U, gate = y_RU[slot_MK[m, j]], gate_MK[m, j]
                for u in range(len(y_U)):
                    y_U[u] += gate * row_U[u]


@parallel
def _combine(y_RU: Any, gate_MK: Any, slot_MK: Any, y_MU: Any, rows: int) -> None:
    for block in prange((y_MU.shape[0] + rows - 1) // rows):
        m, z = block * rows, (block + 1) * rows
        _combine_rows(y_RU, gate_MK[m:z], slot_MK[m:z], y_MU[m:z])


@task
def _expert_rows_backward(
    dy_MU: Any,
    K: int,
    route_R: Any,
    gate_MK: Any,
    gate_up_2FU: Any,
    down_UF: Any,
    sub_norm_F: Any,
    silu: bool,
    gate_up_R2F: Any,
    rstd_R: Any,
    gated_RF: Any,
    dgate_up_R2F: Any,
    dx_RU: Any,
    dgate_MK: Any,
    dsub_norm_F: Any,
) -> None:
    """The derivation is that of `numpy_ref`: a = dy @ down, dgate = a . n, dn = gate * a.

    Leaves gate * n in gated_RF and the projections' gradient in dgate_up_R2F for the weights.
    """
    rows, F = len(route_R), down_UF.shape[1]
    dy_RU = _gather(dy_MU, route_R, K)
    dn_RF = np.empty((rows, F), dy_MU.dtype)
    gemm_nn(1.0, dy_RU, down_UF, 0.0, dn_RF)
    activate_rows(gate_up_R2F, silu, gated_RF)
    normed = len(sub_norm_F) > 0
    h_RF = gated_RF.copy() if normed else gated_RF
    for r in range(rows):
        dn_F, n_F = dn_RF[r], gated_RF[r]
        if normed:
            for f in range(F):
                n_F[f] *= rstd_R[r] * sub_norm_F[f]
        m, j = route_R[r] // K, route_R[r] % K
        gate = gate_MK[m, j]
        dgate_MK[m, j] = row_dot(dn_F, n_F)
        for f in range(F):
            dn_F[f] *= gate
            n_F[f] *= gate
    if normed:
        norm_rows_backward(dn_RF, h_RF, sub_norm_F, rstd_R, dn_RF, dsub_norm_F)
    activate_rows_backward(dn_RF, gate_up_R2F, silu, dgate_up_R2F)
    gemm_nn(1.0, dgate_up_R2F, gate_up_2FU, 0.0, dx_RU)


@parallel
def _experts_backward(
    blocks: Any,
    dy_MU: Any,
    K: int,
    route_R: Any,
    gate_MK: Any,
    gate_up_E2FU: Any,
    down_EUF: Any,
    sub_norm_EF: Any,
    silu: bool,
    gate_up_R2F: Any,
    rstd_R: Any,
    gated_RF: Any,
    dgate_up_R2F: Any,
    dx_RU: Any,
    dgate_MK: Any,
    dsub_norm_blocks: Any,
) -> None:
    for i in prange(blocks.shape[0]):
        e, r, z = blocks[i, 0], blocks[i, 1], blocks[i, 2]
        _expert_rows_backward(
            dy_MU,
            K,
            route_R[r:z],
            gate_MK,
            gate_up_E2FU[e],
            down_EUF[e],
            sub_norm_EF[e],
            silu,
            gate_up_R2F[r:z],
            rstd_R[r:z],
            gated_RF[r:z],
            dgate_up_R2F[r:z],
            dx_RU[r:z],
            dgate_MK,
            dsub_norm_blocks[i],
        )


@task
def _weight_gradient(d_RO: Any, x_MI: Any, route_R: Any, K: int, dw_OI: Any, rows: int) -> None:
    """dw += d^T x over the rows of one expert, x being gathered from the sub-tokens."""
    for r in range(0, len(route_R), rows):
        gemm_tn(1.0, d_RO[r : r + rows], _gather(x_MI, route_R[r : r + rows], K), 1.0, dw_OI)


@task
def _weight_gradient_down(
    dy_MU: Any, gated_RF: Any, route_R: Any, K: int, ddown_UF: Any, rows: int
) -> None:
    """ddown += dy^T (gate n) over the rows of one expert."""
    for r in range(0, len(route_R), rows):
        dy_RU = _gather(dy_MU, route_R[r : r + rows], K)
        gemm_tn(1.0, dy_RU, gated_RF[r : r + rows], 1.0, ddown_UF)


@parallel
def _weight_gradients(
    start_Z: Any,
    x_MU: Any,
    dy_MU: Any,
    K: int,
    route_R: Any,
    gated_RF: Any,
    dgate_up_R2F: Any,
    dgate_up_E2FU: Any,
    ddown_EUF: Any,
    rows: int,
) -> None:
    for i in prange(2 * (len(start_Z) - 1)):
        e = i // 2
        r, z = start_Z[e], start_Z[e + 1]
        if i % 2 == 0:
            _weight_gradient(dgate_up_R2F[r:z], x_MU, route_R[r:z], K, dgate_up_E2FU[e], rows)
        else:
            _weight_gradient_down(dy_MU, gated_RF[r:z], route_R[r:z], K, ddown_EUF[e], rows)


class Experts(Buffers):
    """See `Operations`: the experts."""

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: FloatArray,
        down_EUF: FloatArray,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache]:
        """See `Operations.expert_ffn`."""
        route_R, slot_MK, start_Z = dispatch
        R, dtype = len(route_R), x_MU.dtype
        blocks = _row_blocks(start_Z, ROWS)
        y_MU: FloatArray = self.empty(x_MU.shape, dtype)
        gate_up_R2F = self.empty((R, gate_up_E2FU.shape[1]), dtype)
        rstd_R = None if sub_norm_EF is None else self.empty((R,), dtype)
        with self.scope():
            y_RU = self.empty((R, x_MU.shape[1]), dtype)
            arrays = (
                blocks,
                x_MU,
                gate_MK.shape[1],
                route_R,
                gate_up_E2FU,
                down_EUF,
                _or_nothing(sub_norm_EF, (len(down_EUF), 0), dtype),
                activation == "silu",
                eps,
                gate_up_R2F,
                _or_nothing(rstd_R, (0,), dtype),
                y_RU,
            )
            if R * gate_up_E2FU[0].size * 3 // 2 <= SERIAL_MACS:
                for i in range(len(blocks)):
                    _expert_task(i, *arrays)
            else:
                _experts(*arrays)
            self._combine(y_RU, gate_MK, slot_MK, y_MU)
        return y_MU, ExpertCache(gate_up_R2F, rstd_R)

    @staticmethod
    def _combine(y_RU: FloatArray, gate_MK: FloatArray, slot_MK: IntArray, y_MU: FloatArray) -> None:
        if len(y_MU) <= ROWS_ELEMENTWISE:
            _combine_rows(y_RU, gate_MK, slot_MK, y_MU)
        else:
            _combine(y_RU, gate_MK, slot_MK, y_MU, ROWS_ELEMENTWISE)

    def expert_ffn_backward(
        self,
        dy_MU: FloatArray,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: FloatArray,
        down_EUF: FloatArray,
        sub_norm_EF: FloatArray | None,
        cache: ExpertCache,
        dgate_up_E2FU: FloatArray,
        ddown_EUF: FloatArray,
        dsub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.expert_ffn_backward`."""
        route_R, slot_MK, start_Z = dispatch
        R, K, dtype = len(route_R), gate_MK.shape[1], x_MU.dtype
        blocks = _row_blocks(start_Z, ROWS)
        dx_MU: FloatArray = self.empty(x_MU.shape, dtype)
        dgate_MK: FloatArray = self.empty(gate_MK.shape, dtype)
        dgate_MK[...] = 0
        with self.scope():
            gated_RF = self.empty((R, down_EUF.shape[2]), dtype)
            dgate_up_R2F = self.empty(cache.gate_up_R2F.shape, dtype)
            dx_RU = self.empty((R, x_MU.shape[1]), dtype)
            sub_norm_width = 0 if sub_norm_EF is None else sub_norm_EF.shape[1]
            dsub_norm_blocks = np.zeros((len(blocks), sub_norm_width), dtype)
            _experts_backward(
                blocks,
                dy_MU,
                K,
                route_R,
                gate_MK,
                gate_up_E2FU,
                down_EUF,
                _or_nothing(sub_norm_EF, (len(down_EUF), 0), dtype),
                activation == "silu",
                cache.gate_up_R2F,
                _or_nothing(cache.rstd_R, (0,), dtype),
                gated_RF,
                dgate_up_R2F,
                dx_RU,
                dgate_MK,
                dsub_norm_blocks,
            )
            _weight_gradients(
                start_Z,
                x_MU,
                dy_MU,
                K,
                route_R,
                gated_RF,
                dgate_up_R2F,
                dgate_up_E2FU,
                ddown_EUF,
                ROWS,
            )
            ones_MK = self.empty(gate_MK.shape, dtype)
            ones_MK[...] = 1
            self._combine(dx_RU, ones_MK, slot_MK, dx_MU)
        if dsub_norm_EF is not None:
            np.add.at(dsub_norm_EF, blocks[:, 0], dsub_norm_blocks)
        return dx_MU, dgate_MK


def _or_nothing(x: FloatArray | None, empty_shape: tuple[int, ...], dtype: Any) -> FloatArray:
    """Compiled code wants an array in every place: an empty one stands for None."""
    return np.empty(empty_shape, dtype) if x is None else x
