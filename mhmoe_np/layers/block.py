"""One pre-norm decoder block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mhmoe_np.layers.attention import AttentionCache, attention_backward, attention_forward
from mhmoe_np.layers.balance import RouterStatistics
from mhmoe_np.layers.feed_forward import (
    DENSE,
    FeedForwardCache,
    feed_forward_backward,
    feed_forward_forward,
)
from mhmoe_np.layers.moe import BalanceUpstream, MoeCache, moe_backward, moe_forward
from mhmoe_np.layers.rotary import Rotary
from mhmoe_np.operations.table import LayerWeights, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray

NORM = "input_layernorm.weight"
NORM_2 = "post_attention_layernorm.weight"


class BlockCache(NamedTuple):
    """What the backward needs of the forward."""

    x_ND: FloatArray
    rstd_N: FloatArray
    attention: AttentionCache
    middle_ND: FloatArray  # between the two halves
    middle_rstd_N: FloatArray
    feed_forward: FeedForwardCache | None  # of a dense layer
    moe: MoeCache | None  # of a MoE layer


def block_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    rotary: Rotary,
    counted_N: BoolArray,
    *,
    sequences: int,
    is_moe: bool,
    drop: bool,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, RouterStatistics | None, BlockCache]:
    """x <- x + attn(norm(x)); x <- x + ffn(norm(x)), the ffn being dense or MH-MoE.

    Source   [spec 2]. Statistics are those of the router, where there is one.
    """
    normed_ND, rstd_N = ops.rms_norm(x_ND, w[NORM], eps=config.rms_norm_eps)
    attended_ND, attention = attention_forward(
        normed_ND, w, rotary, sequences=sequences, config=config, ops=ops
    )
    normed_ND, middle_rstd_N = ops.add_in_place_and_norm(
        x_ND, attended_ND, w[NORM_2], eps=config.rms_norm_eps
    )
    middle_ND = attended_ND
    y_ND, statistics, feed_forward, moe = feed_forward_half(
        normed_ND, w, counted_N, is_moe=is_moe, drop=drop, config=config, ops=ops
    )
    y_ND = np.add(middle_ND, y_ND, out=y_ND)
    cache = BlockCache(x_ND, rstd_N, attention, middle_ND, middle_rstd_N, feed_forward, moe)
    return y_ND, statistics, cache


def feed_forward_half(
    normed_ND: FloatArray,
    w: LayerWeights,
    counted_N: BoolArray,
    *,
    is_moe: bool,
    drop: bool,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, RouterStatistics | None, FeedForwardCache | None, MoeCache | None]:
    """The block's second half without norm and residual: dense or MH-MoE."""
    if is_moe:
        y_ND, statistics, moe = moe_forward(normed_ND, w, counted_N, drop=drop, config=config, ops=ops)
        return y_ND, statistics, None, moe
    y_ND, feed_forward = feed_forward_forward(normed_ND, w, DENSE, config=config, ops=ops)
    return y_ND, None, feed_forward, None


def block_backward_in_place(
    dx_ND: FloatArray,
    cache: BlockCache,
    balance: BalanceUpstream | None,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    rotary: Rotary,
    *,
    config: ModelConfig,
    ops: Operations,
) -> None:
    """Turn dx_ND, the gradient of the block's output, into that of its input; add to dw.

    A residual hands its gradient on and adds its branch's: x + f(x) gives dx += f'(x)^T dx.
    """
    with ops.scope():
        if cache.moe is not None and balance is not None:
            dnormed_ND = moe_backward(dx_ND, cache.moe, balance, w, dw, config=config, ops=ops)
        elif cache.feed_forward is not None:
            dnormed_ND = feed_forward_backward(
                dx_ND, cache.feed_forward, w, dw, DENSE, config=config, ops=ops
            )
        ops.rms_norm_backward(
            dnormed_ND, cache.middle_ND, w[NORM_2], cache.middle_rstd_N, dw[NORM_2], onto_ND=dx_ND
        )
        dnormed_ND = attention_backward(dx_ND, cache.attention, w, dw, rotary, config=config, ops=ops)
        ops.rms_norm_backward(dnormed_ND, cache.x_ND, w[NORM], cache.rstd_N, dw[NORM], onto_ND=dx_ND)
