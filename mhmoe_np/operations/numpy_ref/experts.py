"""The experts, the paper's subject: rows sorted by expert, from gathering to the gated sum.

In the functions of one expert R counts that expert's rows, in the others the rows of all.
"""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.numpy_ref.feed_forward import gated_activation, gated_activation_backward
from mhmoe_np.operations.numpy_ref.linear import linear
from mhmoe_np.operations.numpy_ref.norm import rms_norm, rms_norm_backward
from mhmoe_np.operations.numpy_ref.quantise import expert, straight_through
from mhmoe_np.operations.table import Activation, Dispatch, ExpertCache, Weight
from mhmoe_np.types import FloatArray


def _one_expert(
    x_RU: FloatArray,
    gate_up_2FU: Weight,
    down_UF: Weight,
    sub_norm_F: FloatArray | None,
    *,
    activation: Activation,
    eps: float,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Expert(x) = down(n) with n = h or norm(h), h = act(gate(x)) * up(x).

    Returns what the backward needs as well: gate(x) beside up(x), and the norm's 1 / sqrt.
    """
    gate_up_R2F = linear(x_RU, gate_up_2FU, None)
    h_RF = gated_activation(gate_up_R2F, activation=activation)
    n_RF, rstd_R = h_RF, None
    if sub_norm_F is not None:
        n_RF, rstd_R = rms_norm(h_RF, sub_norm_F, eps=eps)
    # P1 eq. 5: Expert(x) = max(x W1^T, 0) W2; here gated
    # GLU eq. 6: Expert(x) = (act(x W) * x V) W2
    y_RU = linear(n_RF, down_UF, None)
    return y_RU, gate_up_R2F, rstd_R


def _one_expert_backward(
    dy_RU: FloatArray,
    x_RU: FloatArray,
    gate_R1: FloatArray,
    gate_up_2FU: Weight,
    down_UF: Weight,
    sub_norm_F: FloatArray | None,
    gate_up_R2F: FloatArray,
    rstd_R: FloatArray | None,
    dgate_up_2FU: FloatArray,
    ddown_UF: FloatArray,
    dsub_norm_F: FloatArray | None,
    *,
    activation: Activation,
) -> tuple[FloatArray, FloatArray]:
    """Return dx_RU and dgate_R, of rows that contribute gate * Expert(x).

    Expert(x) = n @ down^T; let a = dy @ down. Then dgate = dy . (n @ down^T) = a . n, so the expert's
    output itself need not be kept;  ddown += (gate dy)^T n;  dn = gate a;  the rest is the chain rule.
    Quantised, each map's input and weight are what they act as (`straight_through`).
    """
    h_RF = n_RF = gated_activation(gate_up_R2F, activation=activation)
    if sub_norm_F is not None and rstd_R is not None:
        n_RF = h_RF * rstd_R[:, None] * sub_norm_F
    n_RF, acting_down_UF = straight_through(n_RF, down_UF)

    a_RF = dy_RU @ acting_down_UF
    dgate_R = (a_RF * n_RF).sum(axis=1)
    ddown_UF += dy_RU.T @ (gate_R1 * n_RF)
    dh_RF: FloatArray = gate_R1 * a_RF
    if sub_norm_F is not None and rstd_R is not None and dsub_norm_F is not None:
        dh_RF = rms_norm_backward(dh_RF, h_RF, sub_norm_F, rstd_R, dsub_norm_F)

    dgate_up_R2F = gated_activation_backward(dh_RF, gate_up_R2F, activation=activation)
    x_RU, acting_gate_up_2FU = straight_through(x_RU, gate_up_2FU)
    dgate_up_2FU += dgate_up_R2F.T @ x_RU
    return dgate_up_R2F @ acting_gate_up_2FU, dgate_R


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
    """See `Operations.expert_ffn`. Expert by expert; one sees a sub-token at most once."""
    route_R, _, start_Z = dispatch
    R, K = len(route_R), gate_MK.shape[1]
    sub_token_R = route_R // K  # whose row it is
    gate_R1 = gate_MK.reshape(-1, 1)[route_R]  # G(x)_p of that sub-token and the row's expert p
    expert_RU: FloatArray = np.empty((R, x_MU.shape[1]), x_MU.dtype)  # Expert_p(x)
    gate_up_R2F: FloatArray = np.empty((R, gate_up_E2FU.shape[1]), x_MU.dtype)
    rstd_R: FloatArray | None = None if sub_norm_EF is None else np.empty(R, x_MU.dtype)
    y_MU = np.zeros_like(x_MU)
    for e in range(len(start_Z) - 1):
        rows = slice(start_Z[e], start_Z[e + 1])
        expert_RU[rows], gate_up_R2F[rows], rstd = _one_expert(
            x_MU[sub_token_R[rows]],
            expert(gate_up_E2FU, e),
            expert(down_EUF, e),
            None if sub_norm_EF is None else sub_norm_EF[e],
            activation=activation,
            eps=eps,
        )
        if rstd_R is not None:
            rstd_R[rows] = rstd
        # P1 eq. 3 (P1 eq. 1 with one head): y~ = sum_p G(x~)_p Expert_p(x~); a row is one summand
        y_MU[sub_token_R[rows]] += gate_R1[rows] * expert_RU[rows]
    return y_MU, ExpertCache(gate_up_R2F, rstd_R)


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

    P1 eq. 3 sums rows into sub-tokens: each row receives its sub-token's dy, and a sub-token's dx is
    the sum of its rows'.
    """
    route_R, _, start_Z = dispatch
    sub_token_R = route_R // gate_MK.shape[1]
    gate_R1 = gate_MK.reshape(-1, 1)[route_R]
    dx_MU = np.zeros_like(x_MU)
    dgate_MK = np.zeros_like(gate_MK)
    for e in range(len(start_Z) - 1):
        rows = slice(start_Z[e], start_Z[e + 1])
        dx, dgate = _one_expert_backward(
            dy_MU[sub_token_R[rows]],
            x_MU[sub_token_R[rows]],
            gate_R1[rows],
            expert(gate_up_E2FU, e),
            expert(down_EUF, e),
            None if sub_norm_EF is None else sub_norm_EF[e],
            cache.gate_up_R2F[rows],
            None if cache.rstd_R is None else cache.rstd_R[rows],
            dgate_up_E2FU[e],
            ddown_EUF[e],
            None if dsub_norm_EF is None else dsub_norm_EF[e],
            activation=activation,
        )
        dx_MU[sub_token_R[rows]] += dx
        dgate_MK.reshape(-1)[route_R[rows]] = dgate
    return dx_MU, dgate_MK
