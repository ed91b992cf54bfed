"""The router: softmax over all experts, top-k, gates."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.table import Dispatch, RouterLosses, RouterSums, Routing
from mhmoe_np.types import BoolArray, FloatArray


def route(logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
    """See `Operations.route`."""
    highest_M1 = logits_ME.max(axis=1, keepdims=True)
    e_ME = np.exp(logits_ME - highest_M1)
    sum_M1 = e_ME.sum(axis=1, keepdims=True)
    p_ME = e_ME / sum_M1  # P2 eq. 5: g_p = exp(x . e_p) / sum_q exp(x . e_q)
    # A stable sort keeps equal probabilities in index order: ties go to the lower expert.
    expert_MK = np.argsort(-p_ME, axis=1, kind="stable")[:, :top_k].copy()
    gate_MK = np.take_along_axis(p_ME, expert_MK, axis=1)
    if normalise:
        gate_MK /= gate_MK.sum(axis=1, keepdims=True)
    log_sum_exp_M = (highest_M1 + np.log(sum_M1))[:, 0]
    return Routing(p_ME, log_sum_exp_M, expert_MK, gate_MK)


def route_backward(
    dgate_MK: FloatArray,
    routing: Routing,
    counted_M: BoolArray,
    losses: RouterLosses,
    *,
    normalise: bool,
) -> FloatArray:
    """See `Operations.route_backward`.

    Chosen probabilities c = p[I]:  gate = c, or gate = c / S with S = sum(c), whose backward is
    dc = (dgate - sum(dgate gate)) / S.  Softmax:  dlogits = p (dp - sum(dp p)).
    The log-sum-exp's derivative is p itself.
    """
    p_ME, log_sum_exp_M, expert_MK, gate_MK = routing
    count_E, choices, sub_tokens, daux, dz = losses
    real = p_ME.dtype.type
    # Switch eq. 4: aux = E sum_e f_e mean_s p[s, e], f_e = count_e / choices
    dp_E = (daux * len(count_E) * (count_E / choices) / sub_tokens).astype(real)
    # ST-MoE eq. 5: z = mean_s log_sum_exp_s^2
    dlog_sum_exp_M = log_sum_exp_M * counted_M * real(2 * dz / sub_tokens)

    dchosen_MK = dgate_MK
    if normalise:
        sum_M1 = np.take_along_axis(p_ME, expert_MK, axis=1).sum(axis=1, keepdims=True)
        dchosen_MK = (dgate_MK - (dgate_MK * gate_MK).sum(axis=1, keepdims=True)) / sum_M1
    dp_ME = counted_M[:, None] * dp_E
    dp_of_chosen_MK = np.take_along_axis(dp_ME, expert_MK, axis=1) + dchosen_MK
    np.put_along_axis(dp_ME, expert_MK, dp_of_chosen_MK, axis=1)
    dsoftmax_ME = p_ME * (dp_ME - (dp_ME * p_ME).sum(axis=1, keepdims=True))
    return dsoftmax_ME + dlog_sum_exp_M[:, None] * p_ME


def add_router_statistics(
    routing: Routing, dispatch: Dispatch, counted_M: BoolArray, sums: RouterSums
) -> None:
    """See `Operations.add_router_statistics`."""
    p_ME, log_sum_exp_M, expert_MK, _ = routing
    E, real = p_ME.shape[1], p_ME.dtype
    chosen, dropped = expert_MK[counted_M], dispatch.slot_MK[counted_M] < 0  # [counted sub-tokens, K]
    sums.first_choice_E[...] += np.bincount(chosen[:, 0], minlength=E)
    sums.choice_E[...] += np.bincount(chosen.ravel(), minlength=E)
    sums.p_E[...] = sums.p_E.astype(real) + p_ME[counted_M].sum(axis=0)
    sums.dropped_E[...] += np.bincount(chosen[dropped], minlength=E)
    sums.squared_log_sum_exp_1[...] += np.sum(np.square(log_sum_exp_M[counted_M]))
