"""The experts: a span of an expert's rows a task, single-threaded BLAS inside.

Each task gathers its rows, runs both projections in one product, the activation, and the way down;
a second region sums the rows of each sub-token. In the backward the weight gradients have a region of
their own, one task an expert's matrix, so nothing is added from two places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.feed_forward import activate_rows, activate_rows_backward
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_tn
from mhmoe_np.operations.numba_cpu.norm import norm_rows, norm_rows_backward
from mhmoe_np.operations.numba_cpu.packed import Packed, PackedProducts, as_packed
from mhmoe_np.operations.numba_cpu.packed_product import SERIAL_PACKED_MACS
from mhmoe_np.operations.numba_cpu.quantise import act_as_quantised, scale_columns
from mhmoe_np.operations.numba_cpu.regions import ROWS, SERIAL_MACS, run, tasks_of
from mhmoe_np.operations.numba_cpu.routed_rows import combine, gather, spans_of
from mhmoe_np.operations.numba_cpu.stacks import project, stack_of
from mhmoe_np.operations.table import Activation, BitWeight, Dispatch, ExpertCache, PackedWeight, Weight
from mhmoe_np.types import FloatArray

ROWS_OF_GRADIENT = 1024  # that a weight's gradient takes at once


class ExpertsForward(NamedTuple):
    """Every expert on its rows, a span a task."""

    gate_up: Any  # a stack [E, 2F, U]
    down: Any  # a stack [E, U, F]
    sub_norm_EF: Any  # [E, 0]: there is none
    eps: float
    silu: bool
    spans: Any
    x_MU: Any
    route_R: Any
    choices: int  # of a sub-token: K
    gate_up_R2F: Any  # written
    rstd_R: Any  # written where there is a sub-norm
    y_RU: Any  # written: each row's output, not yet gated


@tasks_of(ExpertsForward)
def _experts_forward(i: int, a: Any) -> None:
    e, first, end = a.spans[i, 0], a.spans[i, 1], a.spans[i, 2]
    gate_up_R2F = a.gate_up_R2F[first:end]
    x_RU = gather(a.x_MU, a.route_R[first:end], a.choices)
    project(x_RU, a.gate_up, e, gate_up_R2F)
    h_RF = np.empty((end - first, gate_up_R2F.shape[1] // 2), x_RU.dtype)
    activate_rows(gate_up_R2F, a.silu, h_RF)
    if a.sub_norm_EF.shape[1] > 0:
        norm_rows(h_RF, a.sub_norm_EF[e], a.eps, h_RF, a.rstd_R[first:end])
    project(h_RF, a.down, e, a.y_RU[first:end])


class ExpertsBackward(NamedTuple):
    """The gradients of all but the matrices, a span a task."""

    gate_up: Any  # unpacked, [E, 2F, U]
    down: Any  # unpacked, [E, U, F]
    sub_norm_EF: Any  # [E, 0]: there is none
    silu: bool
    spans: Any
    dy_MU: Any
    route_R: Any
    gate_MK: Any
    gate_up_R2F: Any  # of the forward
    rstd_R: Any  # of the forward
    gated_RF: Any  # written: gate * n, for the gradient of `down`
    dgate_up_R2F: Any  # written
    dx_RU: Any  # written
    dgate_MK: Any  # written where a row carries the choice
    dsub_norms: Any  # [spans, F], added to: each span's share


@tasks_of(ExpertsBackward)
def _experts_backward(i: int, a: Any) -> None:
    """The derivation is that of `numpy_ref`: a = dy @ down, dgate = a . n, dn = gate * a.

    Quantised, n is what it acts as, and dy @ (beta w) = (dy beta) @ w.
    """
    e, first, end = a.spans[i, 0], a.spans[i, 1], a.spans[i, 2]
    gate_up_R2F, dgate_up_R2F = a.gate_up_R2F[first:end], a.dgate_up_R2F[first:end]
    sub_norm_F, rstd_R = a.sub_norm_EF[e], a.rstd_R[first:end]
    n_RF = a.gated_RF[first:end]
    dn_RF = _times_down(a, e, a.route_R[first:end])
    normed = len(sub_norm_F) > 0
    h_RF = np.empty_like(n_RF) if normed else n_RF
    activate_rows(gate_up_R2F, a.silu, h_RF)
    if normed:
        _norm_again(h_RF, rstd_R, sub_norm_F, n_RF)
    if a.down.quantised:
        act_as_quantised(n_RF, n_RF)
    _gates_backward(a, a.route_R[first:end], dn_RF, n_RF)
    if normed:
        norm_rows_backward(dn_RF, h_RF, sub_norm_F, rstd_R, dn_RF, a.dsub_norms[i], False)
    activate_rows_backward(dn_RF, gate_up_R2F, a.silu, dgate_up_R2F)
    if a.gate_up.quantised:
        dacc_R2F = np.empty_like(dgate_up_R2F)
        scale_columns(dgate_up_R2F, a.gate_up.betas[e], dacc_R2F)
        gemm_nn(1.0, dacc_R2F, a.gate_up.w_EOI[e], 0.0, a.dx_RU[first:end])
    else:
        gemm_nn(1.0, dgate_up_R2F, a.gate_up.w_EOI[e], 0.0, a.dx_RU[first:end])


@task
def _times_down(a: Any, e: int, route_R: Any) -> Any:
    """dy @ down for the rows of one span."""
    dy_RU = gather(a.dy_MU, route_R, a.gate_MK.shape[1])
    if a.down.quantised:
        scale_columns(dy_RU, a.down.betas[e], dy_RU)
    dn_RF = np.empty((len(route_R), a.gated_RF.shape[1]), dy_RU.dtype)
    gemm_nn(1.0, dy_RU, a.down.w_EOI[e], 0.0, dn_RF)
    return dn_RF


@task
def _norm_again(h_RF: Any, rstd_R: Any, sub_norm_F: Any, n_RF: Any) -> None:
    """n = norm(h), as in the forward, which keeps rstd alone."""
    for r in range(len(h_RF)):
        h_F, n_F, rstd = h_RF[r], n_RF[r], rstd_R[r]
        for f in range(len(sub_norm_F)):
            n_F[f] = h_F[f] * rstd * sub_norm_F[f]


@task
def _gates_backward(a: Any, route_R: Any, dn_RF: Any, n_RF: Any) -> None:
    """dgate = a . n, with a in dn_RF; then both take their gate: dn = gate * a, and gate * n."""
    choices = a.gate_MK.shape[1]
    for r in range(len(route_R)):
        dn_F, n_F = dn_RF[r], n_RF[r]
        m, j = route_R[r] // choices, route_R[r] % choices
        gate = a.gate_MK[m, j]
        a.dgate_MK[m, j] = row_dot(dn_F, n_F)
        for f in range(len(n_F)):
            dn_F[f] *= gate
            n_F[f] *= gate


class ExpertsWeightGradients(NamedTuple):
    """The gradients of the matrices, one a task: all of gate and up, the larger ones, come first."""

    start_Z: Any
    route_R: Any
    choices: int  # of a sub-token: K
    x_MU: Any
    dy_MU: Any
    gated_RF: Any  # gate * n
    dgate_up_R2F: Any
    quantised: bool  # gate_up is: x counts as what it acts as
    dgate_up_E2FU: Any  # added to
    ddown_EUF: Any  # added to


@tasks_of(ExpertsWeightGradients)
def _weight_gradients(i: int, a: Any) -> None:
    experts = len(a.start_Z) - 1
    e = i % experts
    for first in range(a.start_Z[e], a.start_Z[e + 1], ROWS_OF_GRADIENT):
        end = min(first + ROWS_OF_GRADIENT, a.start_Z[e + 1])
        if i < experts:
            x_RU = gather(a.x_MU, a.route_R[first:end], a.choices)
            if a.quantised:
                act_as_quantised(x_RU, x_RU)
            gemm_tn(1.0, a.dgate_up_R2F[first:end], x_RU, 1.0, a.dgate_up_E2FU[e])
        else:
            dy_RU = gather(a.dy_MU, a.route_R[first:end], a.choices)
            gemm_tn(1.0, dy_RU, a.gated_RF[first:end], 1.0, a.ddown_EUF[e])


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
        down = stack_of(as_packed(down_EUF), self._instruction_set)
        spans = spans_of(start_Z, ROWS)
        y_MU: FloatArray = self.empty(x_MU.shape, dtype)
        gate_up_R2F = self.empty((R, gate_up_E2FU.shape[-2]), dtype)
        rstd_R = None if sub_norm_EF is None else self.empty((R,), dtype)
        with self.scope():
            forward = ExpertsForward(
                gate_up=stack_of(as_packed(gate_up_E2FU), self._instruction_set),
                down=down,
                sub_norm_EF=_or_nothing(sub_norm_EF, (len(start_Z) - 1, 0), dtype),
                eps=eps,
                silu=activation == "silu",
                spans=spans,
                x_MU=x_MU,
                route_R=route_R,
                choices=gate_MK.shape[1],
                gate_up_R2F=gate_up_R2F,
                rstd_R=_or_nothing(rstd_R, (0,), dtype),
                y_RU=self.empty((R, x_MU.shape[1]), dtype),
            )
            macs = gate_up_R2F.size * x_MU.shape[1] * 3 // 2
            serial = SERIAL_PACKED_MACS if isinstance(down, Packed) else SERIAL_MACS
            run(forward, len(spans), macs=macs, serial=serial)
            combine(forward.y_RU, gate_MK, slot_MK, y_MU)
        return y_MU, ExpertCache(gate_up_R2F, rstd_R)

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
        if isinstance(gate_up_E2FU, PackedWeight | Int8Weight):
            raise TypeError("packed weights have no gradient")
        route_R, slot_MK, start_Z = dispatch
        R, E, dtype = len(route_R), len(start_Z) - 1, x_MU.dtype
        spans = spans_of(start_Z, ROWS)
        macs = cache.gate_up_R2F.size * x_MU.shape[1] * 3 // 2
        dx_MU: FloatArray = self.empty(x_MU.shape, dtype)
        dgate_MK: FloatArray = self.empty(gate_MK.shape, dtype)
        dgate_MK[...] = 0
        with self.scope():
            sub_norm_EF = _or_nothing(sub_norm_EF, (E, 0), dtype)
            backward = ExpertsBackward(
                gate_up=stack_of(gate_up_E2FU, self._instruction_set),
                down=stack_of(down_EUF, self._instruction_set),
                sub_norm_EF=sub_norm_EF,
                silu=activation == "silu",
                spans=spans,
                dy_MU=dy_MU,
                route_R=route_R,
                gate_MK=gate_MK,
                gate_up_R2F=cache.gate_up_R2F,
                rstd_R=_or_nothing(cache.rstd_R, (0,), dtype),
                gated_RF=self.empty((R, ddown_EUF.shape[2]), dtype),
                dgate_up_R2F=self.empty(cache.gate_up_R2F.shape, dtype),
                dx_RU=self.empty((R, x_MU.shape[1]), dtype),
                dgate_MK=dgate_MK,
                dsub_norms=np.zeros((len(spans), sub_norm_EF.shape[1]), dtype),
            )
            run(backward, len(spans), macs=macs)
            gradients = ExpertsWeightGradients(
                start_Z=start_Z,
                route_R=route_R,
                choices=gate_MK.shape[1],
                x_MU=x_MU,
                dy_MU=dy_MU,
                gated_RF=backward.gated_RF,
                dgate_up_R2F=backward.dgate_up_R2F,
                quantised=isinstance(gate_up_E2FU, BitWeight),
                dgate_up_E2FU=dgate_up_E2FU,
                ddown_EUF=ddown_EUF,
            )
            run(gradients, 2 * E, macs=macs)
            ones_MK = self.empty(gate_MK.shape, dtype)
            ones_MK[...] = 1
            combine(backward.dx_RU, ones_MK, slot_MK, dx_MU)
        if dsub_norm_EF is not None:
            np.add.at(dsub_norm_EF, spans[:, 0], backward.dsub_norms)
        return dx_MU, dgate_MK


def _or_nothing(x: FloatArray | None, empty_shape: tuple[int, ...], dtype: Any) -> FloatArray:
    """Compiled code wants an array in every place: an empty one stands for None."""
    return np.empty(empty_shape, dtype) if x is None else x
