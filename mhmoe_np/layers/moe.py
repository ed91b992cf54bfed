"""The MH-MoE layer: the paper's equations 1 to 4, there and back.

Dense-routed baselines are the same code with other numbers: SMoE and fine-grained SMoE have one head
and neither head nor merge layer. Departs from the paper only where `DECISIONS.md` says so: gates may
be renormalised [D1], the shared expert stands outside head and merge [D2].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mhmoe_np.layers.balance import (
    RouterStatistics,
    balance_loss_backward,
    router_statistics,
    z_loss_backward,
)
from mhmoe_np.layers.feed_forward import (
    SHARED_EXPERT,
    FeedForwardCache,
    feed_forward_backward,
    feed_forward_forward,
)
from mhmoe_np.operations.table import Dispatch, ExpertCache, LayerWeights, Operations, Routing
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray

HEAD, HEAD_BIAS = "mlp.head_proj.weight", "mlp.head_proj.bias"
MERGE, MERGE_BIAS = "mlp.merge_proj.weight", "mlp.merge_proj.bias"
ROUTER = "mlp.gate.weight"
GATE_UP = "mlp.experts.gate_up_proj.weight"
DOWN = "mlp.experts.down_proj.weight"
SUB_NORM = "mlp.experts.ffn_sub_norm.weight"


class MoeCache(NamedTuple):
    """What the backward and the trace need of the forward."""

    x_ND: FloatArray
    x_MU: FloatArray  # sub-tokens
    logits_ME: FloatArray
    routing: Routing
    dispatch: Dispatch
    experts: ExpertCache
    y_MU: FloatArray  # the experts' gated sums
    shared: FeedForwardCache | None
    counted_M: BoolArray


class BalanceUpstream(NamedTuple):
    """What the balance loss and the z-loss send back into one layer, known from the whole batch."""

    share_E: FloatArray
    sub_tokens: int
    daux: float
    dz: float


def capacity(config: ModelConfig, sub_tokens: int) -> int | None:
    """How many choices one expert takes: max(1, ceil(factor * K * ceil(M/E))), or None: all.

    Source   [spec 4], multiplied from left to right.
    """
    if config.moe_capacity_factor is None:
        return None
    even = math.ceil(sub_tokens / config.num_experts)
    return max(1, math.ceil(config.moe_capacity_factor * config.num_experts_per_tok * even))


def moe_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    counted_N: BoolArray,
    *,
    drop: bool,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, RouterStatistics, MoeCache]:
    """Split each token into H sub-tokens, route each to its own experts, join and merge.

    Source   [P1 eq. 1-4], [spec 3].
    Shapes   x_ND; counted_N says which tokens the router's statistics count -> y_ND.
    drop     whether `moe_capacity_factor` applies.
    """
    N, D = x_ND.shape
    H, U = config.moe_heads, config.sub_token_width
    x_head_ND = ops.linear(x_ND, w[HEAD], w.get(HEAD_BIAS)) if config.moe_head_layer else x_ND
    x_MU = x_head_ND.reshape(N * H, U)  # token-major: row n*H + j is head j of token n

    logits_ME = ops.linear(x_MU, w[ROUTER], None)
    routing = ops.route(logits_ME, top_k=config.num_experts_per_tok, normalise=config.norm_topk_prob)
    dispatch = ops.dispatch(
        routing.expert_MK,
        experts=config.num_experts,
        capacity=capacity(config, N * H) if drop else None,
    )
    y_MU, experts = ops.expert_ffn(
        x_MU,
        routing.gate_MK,
        dispatch,
        w[GATE_UP],
        w[DOWN],
        w.get(SUB_NORM),
        activation=config.hidden_act,
        eps=config.rms_norm_eps,
    )

    y_ND = y_MU.reshape(N, D)
    if config.moe_merge_layer:
        y_ND = ops.linear(y_ND, w[MERGE], w.get(MERGE_BIAS))
    shared = None
    if config.shared_expert_intermediate_size:
        y_shared_ND, shared = feed_forward_forward(x_ND, w, SHARED_EXPERT, config=config, ops=ops)
        y_ND = y_ND + y_shared_ND

    counted_M = np.repeat(counted_N, H)
    statistics = router_statistics(routing, dispatch, counted_M)
    cache = MoeCache(x_ND, x_MU, logits_ME, routing, dispatch, experts, y_MU, shared, counted_M)
    return y_ND, statistics, cache


def moe_backward(
    dy_ND: FloatArray,
    cache: MoeCache,
    balance: BalanceUpstream,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    *,
    config: ModelConfig,
    ops: Operations,
) -> FloatArray:
    """Return dx_ND; add to dw. Every step of the forward, in the opposite order.

    A sub-token's gradient has two sources: the experts it went to and the router that chose them.
    """
    N, D = dy_ND.shape
    dy_merged_ND = dy_ND
    if config.moe_merge_layer:
        dy_merged_ND = ops.linear_backward(
            dy_ND, cache.y_MU.reshape(N, D), w[MERGE], dw[MERGE], dw.get(MERGE_BIAS)
        )
    dx_MU, dgate_MK = ops.expert_ffn_backward(
        dy_merged_ND.reshape(cache.y_MU.shape),
        cache.x_MU,
        cache.routing.gate_MK,
        cache.dispatch,
        w[GATE_UP],
        w[DOWN],
        w.get(SUB_NORM),
        cache.experts,
        dw[GATE_UP],
        dw[DOWN],
        dw.get(SUB_NORM),
        activation=config.hidden_act,
    )
    dp_E = balance_loss_backward(
        balance.share_E, daux=balance.daux, sub_tokens=balance.sub_tokens
    ).astype(dy_ND.dtype)
    dlog_sum_exp_M = z_loss_backward(
        cache.routing.log_sum_exp_M,
        cache.counted_M,
        dz=balance.dz,
        sub_tokens=balance.sub_tokens,
    )
    dlogits_ME = ops.route_backward(
        dgate_MK,
        dp_E,
        dlog_sum_exp_M,
        cache.routing,
        cache.counted_M,
        normalise=config.norm_topk_prob,
    )
    ops.linear_backward(dlogits_ME, cache.x_MU, w[ROUTER], dw[ROUTER], None, onto_NI=dx_MU)

    dx_ND = dx_MU.reshape(N, D)
    if config.moe_head_layer:
        dx_ND = ops.linear_backward(dx_ND, cache.x_ND, w[HEAD], dw[HEAD], dw.get(HEAD_BIAS))
    if cache.shared is not None:
        dx_ND = dx_ND + feed_forward_backward(
            dy_ND, cache.shared, w, dw, SHARED_EXPERT, config=config, ops=ops
        )
    return dx_ND
