"""The experts on rows sorted by expert, from gathering to the gated sum."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.numpy_ref.feed_forward import gated_activation, gated_activation_backward
from mhmoe_np.operations.numpy_ref.linear import linear
from mhmoe_np.operations.numpy_ref.norm import rms_norm, rms_norm_backward
from mhmoe_np.operations.numpy_ref.quantise import expert, straight_through
from mhmoe_np.operations.table import Activation, Dispatch, ExpertCache, Weight
from mhmoe_np.types import FloatArray


def expert_ffn(
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
    """See `Operations.expert_ffn`. Every expert in turn; an expert sees a sub-token at most once."""
    route_R, _, start_Z = dispatch
    K = gate_MK.shape[1]
    y_MU = np.zeros_like(x_MU)
    gate_up_of_expert, rstd_R = [], None
    if sub_norm_EF is not None:
        rstd_R = np.empty(len(route_R), x_MU.dtype)
    for e in range(len(start_Z) - 1):
        rows = slice(start_Z[e], start_Z[e + 1])
        sub_token = route_R[rows] // K
        gate_up = linear(x_MU[sub_token], expert(gate_up_E2FU, e), None)
        gate_up_of_expert.append(gate_up)
        h = gated_activation(gate_up, activation=activation)
        if sub_norm_EF is not None and rstd_R is not None:
            h, rstd_R[rows] = rms_norm(h, sub_norm_EF[e], eps=eps)
        y = linear(h, expert(down_EUF, e), None)
        y_MU[sub_token] += gate_MK.ravel()[route_R[rows], None] * y
    return y_MU, ExpertCache(np.concatenate(gate_up_of_expert), rstd_R)


def expert_ffn_backward(
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
    """See `Operations.expert_ffn_backward`.

    A row contributes gate * (n @ down^T) with n = h, or n = norm(h). Let a = dy @ down: then
    dgate = dy . (n @ down^T) = a . n, so the expert's output itself need not be kept;
    dn = gate * a;  ddown = sum over rows of gate * dy^T n; the rest is the chain rule.
    Quantised, each map's input and weight are what they act as (`straight_through`).
    """
    route_R, _, start_Z = dispatch
    K = gate_MK.shape[1]
    dx_MU = np.zeros_like(x_MU)
    dgate_MK = np.zeros_like(gate_MK)
    for e in range(len(start_Z) - 1):
        rows = slice(start_Z[e], start_Z[e + 1])
        route = route_R[rows]
        sub_token = route // K
        gate = gate_MK.ravel()[route, None]
        h = n = gated_activation(cache.gate_up_R2F[rows], activation=activation)
        if sub_norm_EF is not None and cache.rstd_R is not None:
            n = h * cache.rstd_R[rows, None] * sub_norm_EF[e]
        n, down = straight_through(n, expert(down_EUF, e))
        a = dy_MU[sub_token] @ down
        dgate_MK.ravel()[route] = (a * n).sum(axis=1)
        ddown_EUF[e] += dy_MU[sub_token].T @ (gate * n)
        dh = gate * a
        if sub_norm_EF is not None and cache.rstd_R is not None and dsub_norm_EF is not None:
            dh = rms_norm_backward(dh, h, sub_norm_EF[e], cache.rstd_R[rows], dsub_norm_EF[e])
        dgate_up = gated_activation_backward(dh, cache.gate_up_R2F[rows], activation=activation)
        x, gate_up = straight_through(x_MU[sub_token], expert(gate_up_E2FU, e))
        dgate_up_E2FU[e] += dgate_up.T @ x
        dx_MU[sub_token] += dgate_up @ gate_up
    return dx_MU, dgate_MK
