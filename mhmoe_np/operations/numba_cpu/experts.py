"""The experts: one parallel region over (expert, block of its rows), single-threaded BLAS inside.

Each task gathers its rows, runs both projections in one product, the activation, and the way down;
a second region sums the rows of each sub-token. In the backward the weight gradients have a region of
their own, one task an expert's matrix, so nothing is added from two places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.extending import overload

from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.compiling import (
    ROWS,
    ROWS_ELEMENTWISE,
    SERIAL_MACS,
    parallel,
    task,
)
from mhmoe_np.operations.numba_cpu.feed_forward import activate_rows, activate_rows_backward
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_tn, product_nt
from mhmoe_np.operations.numba_cpu.norm import norm_rows, norm_rows_backward
from mhmoe_np.operations.numba_cpu.packed import (
    SERIAL_PACKED_MACS,
    Packed,
    PackedProducts,
    as_packed,
    as_stack,
    project_packed,
)
from mhmoe_np.operations.numba_cpu.quantise import (
    act_as_quantised,
    quantise_block,
    scale_block,
    scale_columns,
)
from mhmoe_np.operations.numba_cpu.regions import take_number, workers
from mhmoe_np.operations.table import (
    Activation,
    BitWeight,
    Dispatch,
    ExpertCache,
    PackedWeight,
    Weight,
)
from mhmoe_np.types import FloatArray, IntArray

ROWS_OF_GRADIENT = 1024  # that a weight's gradient takes at once


@task
def _row_blocks(start_Z: Any, rows: int) -> Any:
    """[expert, first row, last row + 1] of each task: an expert's in equal blocks of about `rows`."""
    parts_E = np.empty(len(start_Z) - 1, np.int64)
    for e in range(len(parts_E)):
        count = start_Z[e + 1] - start_Z[e]
        parts_E[e] = max((count + rows // 2) // rows, min(count, 1))
    blocks = np.empty((parts_E.sum(), 3), np.int64)
    i = 0
    for e in range(len(parts_E)):
        first, count = start_Z[e], start_Z[e + 1] - start_Z[e]
        for part in range(parts_E[e]):
            blocks[i, 0] = e
            blocks[i, 1] = first + count * part // parts_E[e]
            blocks[i, 2] = first + count * (part + 1) // parts_E[e]
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


class Floats(NamedTuple):
    """A stack of float matrices; with scales, of a `BitWeight`'s integers."""

    w: Any  # [E, O, I]
    beta: Any  # [E, O], or [E, 0]: not quantised


def _project(x_RI: Any, weight: Any, e: int, y_RO: Any) -> None:
    """y = x @ w[e]^T for a stack of any kind; a BitLinear may leave x quantised."""
    raise NotImplementedError("compiled code only")


@overload(_project)
def _compiled_project(x_RI: Any, weight: Any, e: Any, y_RO: Any) -> Any:
    kind = _project_floats if weight.instance_class is Floats else project_packed

    def project(x_RI: Any, weight: Any, e: Any, y_RO: Any) -> None:
        kind(x_RI, weight, e, y_RO)

    return project


@task
def _project_floats(x_RI: Any, weight: Any, e: int, y_RO: Any) -> None:
    beta_O = weight.beta[e]
    if len(beta_O) > 0:
        scale_R = np.empty(len(x_RI), x_RI.dtype)
        quantise_block(x_RI, x_RI, scale_R)
        product_nt(x_RI, weight.w[e], y_RO)
        scale_block(y_RO, scale_R, beta_O)
    else:
        product_nt(x_RI, weight.w[e], y_RO)


@task
def _expert_task(
    i: int,
    gate_up: Any,
    down: Any,
    blocks: Any,
    x_MU: Any,
    K: int,
    route_R: Any,
    sub_norm_EF: Any,
    silu: bool,
    eps: float,
    gate_up_R2F: Any,
    rstd_R: Any,
    y_RU: Any,
) -> None:
    e, r, z = blocks[i, 0], blocks[i, 1], blocks[i, 2]
    x_RU = _gather(x_MU, route_R[r:z], K)
    _project(x_RU, gate_up, e, gate_up_R2F[r:z])
    h_RF = np.empty((z - r, gate_up_R2F.shape[1] // 2), x_MU.dtype)
    activate_rows(gate_up_R2F[r:z], silu, h_RF)
    if sub_norm_EF.shape[1] > 0:
        norm_rows(h_RF, sub_norm_EF[e], eps, h_RF, rstd_R[r:z])
    _project(h_RF, down, e, y_RU[r:z])


@task
def _expert_worker(counter: Any, tasks: int, gate_up: Any, down: Any, arrays: Any) -> None:
    while True:
        i = take_number(counter)
        if i >= tasks:
            return
        _expert_task(i, gate_up, down, *arrays)


@parallel
def _experts(workers: int, counter: Any, tasks: int, gate_up: Any, down: Any, arrays: Any) -> None:
    for _ in prange(workers):
        _expert_worker(counter, tasks, gate_up, down, arrays)


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
def _expert_task_backward(
    i: int,
    gate_up: Any,
    down: Any,
    blocks: Any,
    dy_MU: Any,
    K: int,
    route_R: Any,
    gate_MK: Any,
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
    """The derivation is that of `numpy_ref`: a = dy @ down, dgate = a . n, dn = gate * a.

    Leaves gate * n in gated_RF and the projections' gradient in dgate_up_R2F for the weights.
    Quantised, n is what it acts as, and dy @ (beta w) = (dy beta) @ w.
    """
    e, r, z = blocks[i, 0], blocks[i, 1], blocks[i, 2]
    route_R, gate_up_R2F, rstd_R = route_R[r:z], gate_up_R2F[r:z], rstd_R[r:z]
    gated_RF, dgate_up_R2F, dx_RU = gated_RF[r:z], dgate_up_R2F[r:z], dx_RU[r:z]
    sub_norm_F, dsub_norm_F = sub_norm_EF[e], dsub_norm_blocks[i]
    rows, F = gated_RF.shape
    dy_RU = _gather(dy_MU, route_R, K)
    scale_columns(dy_RU, down.beta[e], dy_RU)
    dn_RF = np.empty((rows, F), dy_MU.dtype)
    gemm_nn(1.0, dy_RU, down.w[e], 0.0, dn_RF)
    h_RF = np.empty((rows, F), dy_MU.dtype) if len(sub_norm_F) > 0 else gated_RF
    activate_rows(gate_up_R2F, silu, h_RF)
    if len(sub_norm_F) > 0:
        for r in range(rows):
            h_F, n_F, rstd = h_RF[r], gated_RF[r], rstd_R[r]
            for f in range(F):
                n_F[f] = h_F[f] * rstd * sub_norm_F[f]
    if down.beta.shape[1] > 0:
        act_as_quantised(gated_RF, gated_RF)
    for r in range(rows):
        dn_F, n_F = dn_RF[r], gated_RF[r]
        m, j = route_R[r] // K, route_R[r] % K
        gate = gate_MK[m, j]
        dgate_MK[m, j] = row_dot(dn_F, n_F)
        for f in range(F):
            dn_F[f] *= gate
            n_F[f] *= gate
    if len(sub_norm_F) > 0:
        norm_rows_backward(dn_RF, h_RF, sub_norm_F, rstd_R, dn_RF, dsub_norm_F, False)
    activate_rows_backward(dn_RF, gate_up_R2F, silu, dgate_up_R2F)
    if gate_up.beta.shape[1] > 0:
        dacc_R2F = np.empty_like(dgate_up_R2F)
        scale_columns(dgate_up_R2F, gate_up.beta[e], dacc_R2F)
        gemm_nn(1.0, dacc_R2F, gate_up.w[e], 0.0, dx_RU)
    else:
        gemm_nn(1.0, dgate_up_R2F, gate_up.w[e], 0.0, dx_RU)


@task
def _backward_worker(counter: Any, tasks: int, gate_up: Any, down: Any, arrays: Any) -> None:
    while True:
        i = take_number(counter)
        if i >= tasks:
            return
        _expert_task_backward(i, gate_up, down, *arrays)


@parallel
def _experts_backward(
    workers: int, counter: Any, tasks: int, gate_up: Any, down: Any, arrays: Any
) -> None:
    for _ in prange(workers):
        _backward_worker(counter, tasks, gate_up, down, arrays)


@task
def _weight_gradient(
    d_RO: Any, x_MI: Any, route_R: Any, K: int, quantised: bool, dw_OI: Any, rows: int
) -> None:
    """dw += d^T x over the rows of one expert, x being gathered from the sub-tokens."""
    for r in range(0, len(route_R), rows):
        x_RI = _gather(x_MI, route_R[r : r + rows], K)
        if quantised:
            act_as_quantised(x_RI, x_RI)
        gemm_tn(1.0, d_RO[r : r + rows], x_RI, 1.0, dw_OI)


@task
def _weight_gradient_down(
    dy_MU: Any, gated_RF: Any, route_R: Any, K: int, ddown_UF: Any, rows: int
) -> None:
    """ddown += dy^T (gate n) over the rows of one expert."""
    for r in range(0, len(route_R), rows):
        dy_RU = _gather(dy_MU, route_R[r : r + rows], K)
        gemm_tn(1.0, dy_RU, gated_RF[r : r + rows], 1.0, ddown_UF)


@task
def _weight_gradient_task(
    i: int,
    start_Z: Any,
    x_MU: Any,
    dy_MU: Any,
    K: int,
    route_R: Any,
    quantised: bool,
    gated_RF: Any,
    dgate_up_R2F: Any,
    dgate_up_E2FU: Any,
    ddown_EUF: Any,
    rows: int,
) -> None:
    """The larger matrices, of gate and up, first."""
    E = len(start_Z) - 1
    e = i % E
    r, z = start_Z[e], start_Z[e + 1]
    if i < E:
        _weight_gradient(dgate_up_R2F[r:z], x_MU, route_R[r:z], K, quantised, dgate_up_E2FU[e], rows)
    else:
        _weight_gradient_down(dy_MU, gated_RF[r:z], route_R[r:z], K, ddown_EUF[e], rows)


@task
def _weight_gradient_worker(counter: Any, tasks: int, arrays: Any) -> None:
    while True:
        i = take_number(counter)
        if i >= tasks:
            return
        _weight_gradient_task(i, *arrays)


@parallel
def _weight_gradients(workers: int, counter: Any, tasks: int, arrays: Any) -> None:
    for _ in prange(workers):
        _weight_gradient_worker(counter, tasks, arrays)


class Experts(PackedProducts):
    """See `Operations`: the experts."""

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache]:
        """See `Operations.expert_ffn`."""
        route_R, slot_MK, start_Z = dispatch
        R, dtype = len(route_R), x_MU.dtype
        gate_up, down = self._stack(as_packed(gate_up_E2FU)), self._stack(as_packed(down_EUF))
        blocks = _row_blocks(start_Z, ROWS)
        y_MU: FloatArray = self.empty(x_MU.shape, dtype)
        gate_up_R2F = self.empty((R, _outputs(gate_up_E2FU)), dtype)
        rstd_R = None if sub_norm_EF is None else self.empty((R,), dtype)
        with self.scope():
            y_RU = self.empty((R, x_MU.shape[1]), dtype)
            arrays = (
                blocks,
                x_MU,
                gate_MK.shape[1],
                route_R,
                _or_nothing(sub_norm_EF, (len(start_Z) - 1, 0), dtype),
                activation == "silu",
                eps,
                gate_up_R2F,
                _or_nothing(rstd_R, (0,), dtype),
                y_RU,
            )
            serial = SERIAL_PACKED_MACS if isinstance(down, Packed) else SERIAL_MACS
            if R * gate_up_R2F.shape[1] * x_MU.shape[1] * 3 // 2 <= serial:
                for i in range(len(blocks)):
                    _expert_task(i, gate_up, down, *arrays)
            else:
                _experts(*workers(), len(blocks), gate_up, down, arrays)
            self._combine(y_RU, gate_MK, slot_MK, y_MU)
        return y_MU, ExpertCache(gate_up_R2F, rstd_R)

    def _stack(self, weight: Weight) -> Floats | Packed:
        if isinstance(weight, PackedWeight):
            return as_stack(weight, self._instruction_set)
        if isinstance(weight, BitWeight):
            return Floats(weight.w, weight.beta)
        return Floats(weight, np.empty((len(weight), 0), weight.dtype))

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
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        cache: ExpertCache,
        dgate_up_E2FU: FloatArray,
        ddown_EUF: FloatArray,
        dsub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.expert_ffn_backward`."""
        gate_up, down = self._stack(gate_up_E2FU), self._stack(down_EUF)
        if isinstance(down, Packed):
            raise TypeError("packed weights have no gradient")
        route_R, slot_MK, start_Z = dispatch
        R, K, dtype = len(route_R), gate_MK.shape[1], x_MU.dtype
        blocks = _row_blocks(start_Z, ROWS)
        dx_MU: FloatArray = self.empty(x_MU.shape, dtype)
        dgate_MK: FloatArray = self.empty(gate_MK.shape, dtype)
        dgate_MK[...] = 0
        with self.scope():
            gated_RF = self.empty((R, ddown_EUF.shape[2]), dtype)
            dgate_up_R2F = self.empty(cache.gate_up_R2F.shape, dtype)
            dx_RU = self.empty((R, x_MU.shape[1]), dtype)
            sub_norm_width = 0 if sub_norm_EF is None else sub_norm_EF.shape[1]
            dsub_norm_blocks = np.zeros((len(blocks), sub_norm_width), dtype)
            arrays = (
                blocks,
                dy_MU,
                K,
                route_R,
                gate_MK,
                _or_nothing(sub_norm_EF, (len(start_Z) - 1, 0), dtype),
                activation == "silu",
                cache.gate_up_R2F,
                _or_nothing(cache.rstd_R, (0,), dtype),
                gated_RF,
                dgate_up_R2F,
                dx_RU,
                dgate_MK,
                dsub_norm_blocks,
            )
            _experts_backward(*workers(), len(blocks), gate_up, down, arrays)
            matrices = (
                start_Z,
                x_MU,
                dy_MU,
                K,
                route_R,
                isinstance(gate_up_E2FU, BitWeight),
                gated_RF,
                dgate_up_R2F,
                dgate_up_E2FU,
                ddown_EUF,
                ROWS_OF_GRADIENT,
            )
            _weight_gradients(*workers(), 2 * (len(start_Z) - 1), matrices)
            ones_MK = self.empty(gate_MK.shape, dtype)
            ones_MK[...] = 1
            self._combine(dx_RU, ones_MK, slot_MK, dx_MU)
        if dsub_norm_EF is not None:
            np.add.at(dsub_norm_EF, blocks[:, 0], dsub_norm_blocks)
        return dx_MU, dgate_MK


def _outputs(weight: Weight) -> int:
    """O of a stack [E, O, I]."""
    outputs: int = weight.shape[-2]
    return outputs


def _or_nothing(x: FloatArray | None, empty_shape: tuple[int, ...], dtype: Any) -> FloatArray:
    """Compiled code wants an array in every place: an empty one stands for None."""
    return np.empty(empty_shape, dtype) if x is None else x
