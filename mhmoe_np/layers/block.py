"""One pre-norm decoder block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_np.layers.attention import AttentionCache, Past, attention_backward, attention_forward
from mhmoe_np.layers.balance import Tally
from mhmoe_np.layers.feed_forward import (
    DENSE,
    FeedForwardCache,
    feed_forward_backward,
    feed_forward_forward,
)
from mhmoe_np.layers.moe import ROUTER, MoeCache, moe_backward, moe_forward
from mhmoe_np.layers.rotary import Rotary
from mhmoe_np.operations.table import LayerWeights, Operations, RouterLosses
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

NORM = "input_layernorm.weight"
NORM_2 = "post_attention_layernorm.weight"


class BlockCache(NamedTuple):
    """What the backward needs of the forward."""

    x_ND: FloatArray
    rstd_N: FloatArray
    attention: AttentionCache
    middle_ND: FloatArray  # between the two halves
    middle_rstd_N: FloatArray
    feed_forward: FeedForwardCache | MoeCache  # of a dense or of a MoE layer


def block_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    rotary: Rotary,
    past: Past | None,
    tally: Tally | None,
    *,
    sequences: int,
    drop: bool,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, BlockCache]:
    r"""x <- x + attn(norm(x)); x <- x + ffn(norm(x)), the ffn being MH-MoE where w has a router.

    past, tally, drop: see `attention_forward` and `moe_forward`.

    Equation x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)) \\
             x \leftarrow x + \mathrm{ffn}(\mathrm{norm}(x))
    Shapes   x_ND, rotary -> y_ND
    Source   [spec 2 pre-norm]
    """
    eps = config.rms_norm_eps
    normed_ND, rstd_N = ops.rms_norm(x_ND, w[NORM], eps=eps)
    middle_ND, attention = attention_forward(
        normed_ND, w, rotary, past, sequences=sequences, config=config, ops=ops
    )
    normed_ND, middle_rstd_N = ops.add_in_place_and_norm(x_ND, middle_ND, w[NORM_2], eps=eps)
    feed_forward: FeedForwardCache | MoeCache
    if ROUTER in w:
        y_ND, feed_forward = moe_forward(normed_ND, w, tally, drop=drop, config=config, ops=ops)
    else:
        y_ND, feed_forward = feed_forward_forward(normed_ND, w, DENSE, config=config, ops=ops)
    ops.add_in_place(middle_ND, y_ND)
    cache = BlockCache(x_ND, rstd_N, attention, middle_ND, middle_rstd_N, feed_forward)
    return y_ND, cache


def block_backward_in_place(
    dx_ND: FloatArray,
    cache: BlockCache,
    losses: RouterLosses | None,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    rotary: Rotary,
    *,
    config: ModelConfig,
    ops: Operations,
) -> None:
    """Turn dx_ND, the gradient of the block's output, into that of its input; add to dw.

    A residual hands its gradient on and adds its branch's: x + f(x) gives dx += f'(x)^T dx.

    Shapes   dx_ND, cache, rotary
    Source   [spec 2 pre-norm]
    """
    with ops.scope():
        if isinstance(cache.feed_forward, MoeCache):
            assert losses is not None
            dnormed_ND = moe_backward(dx_ND, cache.feed_forward, losses, w, dw, config=config, ops=ops)
        else:
            dnormed_ND = feed_forward_backward(
                dx_ND, cache.feed_forward, w, dw, DENSE, config=config, ops=ops
            )
        ops.rms_norm_backward(
            dnormed_ND, cache.middle_ND, w[NORM_2], cache.middle_rstd_N, dw[NORM_2], onto_ND=dx_ND
        )
        dnormed_ND = attention_backward(dx_ND, cache.attention, w, dw, rotary, config=config, ops=ops)
        ops.rms_norm_backward(dnormed_ND, cache.x_ND, w[NORM], cache.rstd_N, dw[NORM], onto_ND=dx_ND)
