"""The MH-MoE layer: the paper's equations 2 to 4, there and back.

Dense-routed baselines are the same code with other numbers: SMoE and fine-grained SMoE have one head
and neither head nor merge layer. Departs from the paper only where `DECISIONS.md` says so: gates may
be renormalised [D1], the shared expert stands outside head and merge [D2].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_np.layers.balance import Tally
from mhmoe_np.layers.feed_forward import (
    SHARED_EXPERT,
    FeedForwardCache,
    feed_forward_backward,
    feed_forward_forward,
)
from mhmoe_np.operations.table import (
    Dispatch,
    ExpertCache,
    LayerWeights,
    Operations,
    RouterLosses,
    Routing,
)
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
    joined_ND: FloatArray | None  # what the merge layer saw, where there is one
    shared: FeedForwardCache | None
    counted_M: BoolArray | None  # None: nobody counts, so there is no way back


def capacity(config: ModelConfig, sub_tokens: int) -> int | None:
    r"""How many choices one expert takes: max(1, ceil(factor * K * ceil(M/E))), or None: all.

    Multiplied from left to right.

    Equation \mathrm{capacity} = \max\left( 1, \left\lceil \mathrm{factor} \cdot K \cdot \left\lceil
               \frac{M}{E} \right\rceil \right\rceil \right)
    Source   [spec 4 capacity]
    """
    if config.moe_capacity_factor is None:
        return None
    even = math.ceil(sub_tokens / config.num_experts)
    return max(1, math.ceil(config.moe_capacity_factor * config.num_experts_per_tok * even))


def moe_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    tally: Tally | None,
    *,
    drop: bool,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, MoeCache]:
    r"""Split each token into H sub-tokens, route each to its own experts, join and merge.

    tally: where the router's statistics are added up; None: nobody asks for them.
    drop: whether `moe_capacity_factor` applies.

    Equation \hat X = X W_{\mathrm{head}}^{\top} + b_{\mathrm{head}} \\
             \tilde X = \mathrm{reshape}(\hat X) \\
             \tilde x_{nH + j,\, u} = \hat x_{n,\, jU + u} \\
             p_m = \mathrm{softmax}(W_{\mathrm{gate}}\, \tilde x_m) \\
             I_m = \text{the } K \text{ largest } p_m \\
             g_m = p_{m, I_m} \\
             \tilde y_m = \sum_k g_{mk}\, \mathrm{Expert}_{I_{mk}}(\tilde x_m) \\
             Y = \mathrm{reshape}(\tilde Y)\, W_{\mathrm{merge}}^{\top} + b_{\mathrm{merge}} +
               \mathrm{SharedExpert}(X)
    Shapes   x_ND -> y_ND
    Source   [P1 eq. 2-4], with one head and no projections [P1 eq. 1]; the splitting [P2 eq. 4], the
             joining [P2 eq. 8]; [spec 3 head layer], [spec 3 reshape], [spec 3 merge layer]; the
             residual, where `moe_residual` asks for it, [P2 eq. 6], [D3]
    """
    N, D = x_ND.shape
    H, U = config.moe_heads, config.sub_token_width

    x_head_ND = x_ND
    if config.moe_head_layer:
        x_head_ND = ops.linear(x_ND, w[HEAD], w.get(HEAD_BIAS))  # P1 eq. 2: x^ = x W_head
    # P2 eq. 4: sub-tokens, row n*H + j being the j-th of token n
    x_MU = x_head_ND.reshape(N * H, U)

    logits_ME = ops.linear(x_MU, w[ROUTER], None)
    routing = ops.route(logits_ME, top_k=config.num_experts_per_tok, normalise=config.norm_topk_prob)
    dispatch = ops.dispatch(
        routing.expert_MK,
        experts=config.num_experts,
        capacity=capacity(config, N * H) if drop else None,
    )
    y_MU, experts = ops.expert_ffn(  # P1 eq. 3 (P1 eq. 1 with one head)
        x_MU,
        routing.gate_MK,
        dispatch,
        w[GATE_UP],
        w[DOWN],
        w.get(SUB_NORM),
        activation=config.hidden_act,
        eps=config.rms_norm_eps,
    )

    if config.moe_residual:
        ops.add_in_place(x_MU, y_MU)  # P2 eq. 6: o = x + sum_p g_p f_p(x), of each sub-token

    y_ND, joined_ND = y_MU.reshape(N, D), None  # P2 eq. 8: a token's sub-tokens side by side
    if config.moe_merge_layer:
        joined_ND = y_ND
        y_ND = ops.linear(joined_ND, w[MERGE], w.get(MERGE_BIAS))  # P1 eq. 4: y = y^ W_merge
    shared = None
    if config.shared_expert_intermediate_size:
        y_shared_ND, shared = feed_forward_forward(x_ND, w, SHARED_EXPERT, config=config, ops=ops)
        ops.add_in_place(y_shared_ND, y_ND)

    counted_M = None
    if tally is not None:
        counted_M = tally.counted_M
        if tally.sums is not None:
            ops.add_router_statistics(routing, dispatch, counted_M, tally.sums)
    cache = MoeCache(x_ND, x_MU, logits_ME, routing, dispatch, experts, joined_ND, shared, counted_M)
    return y_ND, cache


def moe_backward(
    dy_ND: FloatArray,
    cache: MoeCache,
    losses: RouterLosses,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    *,
    config: ModelConfig,
    ops: Operations,
) -> FloatArray:
    """Return dx_ND; add to dw. Every step of the forward, in the opposite order.

    A sub-token's gradient has two sources: the experts it went to and the router that chose them. Into
    the router the task sends dgate, the balance loss and the z-loss what `losses` says.

    Shapes   dy_ND, cache, losses -> dx_ND
    Source   [P1 eq. 2-4], [P2 eq. 6], [spec 3 head layer], [spec 3 merge layer]
    """
    assert cache.counted_M is not None
    N, D = dy_ND.shape
    djoined_ND = dy_ND
    if cache.joined_ND is not None:  # P1 eq. 4
        djoined_ND = ops.linear_backward(
            dy_ND, cache.joined_ND, w[MERGE], dw[MERGE], dw.get(MERGE_BIAS)
        )
    dx_MU, dgate_MK = ops.expert_ffn_backward(  # P1 eq. 3
        djoined_ND.reshape(cache.x_MU.shape),
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
    if config.moe_residual:  # P2 eq. 6
        ops.add_in_place(djoined_ND.reshape(cache.x_MU.shape), dx_MU)
    dlogits_ME = ops.route_backward(
        dgate_MK, cache.routing, cache.counted_M, losses, normalise=config.norm_topk_prob
    )
    ops.linear_backward(dlogits_ME, cache.x_MU, w[ROUTER], dw[ROUTER], None, onto_NI=dx_MU)

    dx_ND = dx_MU.reshape(N, D)
    if config.moe_head_layer:  # P1 eq. 2
        dx_ND = ops.linear_backward(dx_ND, cache.x_ND, w[HEAD], dw[HEAD], dw.get(HEAD_BIAS))
    if cache.shared is not None:
        dx_shared_ND = feed_forward_backward(
            dy_ND, cache.shared, w, dw, SHARED_EXPERT, config=config, ops=ops
        )
        ops.add_in_place(dx_shared_ND, dx_ND)
    return dx_ND
