"""The attention layer: joint projection, rotary positions, attention, output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_np.layers.rotary import Rotary
from mhmoe_np.operations.table import LayerWeights, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray

QKV = "self_attn.qkv_proj.weight"
OUT = "self_attn.o_proj.weight"
SUB_NORM = "self_attn.attn_sub_norm.weight"


class Past(NamedTuple):
    """The keys and values of all positions of some sequences so far, with room for more."""

    kv_BS2GC: FloatArray  # keys, then values
    filled_1: IntArray  # positions


class AttentionCache(NamedTuple):
    """What the backward needs of the forward."""

    x_ND: FloatArray
    qkv_BTQ: FloatArray  # after the rotation
    out_BTAC: FloatArray
    log_sum_exp_BAT: FloatArray | None  # None: there was a past, so there is no way back
    normed_NI: FloatArray  # what the output projection saw
    rstd_N: FloatArray | None


def split_heads(qkv_BTQ: FloatArray, config: ModelConfig) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Views of the joint projection.

    Shapes   qkv_BTQ -> q_BTAC, k_BTGC, v_BTGC
    Source   [spec 2 attention]
    """
    B, T, _ = qkv_BTQ.shape
    A, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    heads = qkv_BTQ.reshape(B, T, A + 2 * G, C)
    return heads[:, :, :A], heads[:, :, A : A + G], heads[:, :, A + G :]


def turned_heads(qkv_BTQ: FloatArray, config: ModelConfig) -> FloatArray:
    """The view of the joint projection's heads that have positions: those of q, then those of k.

    Shapes   qkv_BTQ -> [B, T, A+G, C]
    Source   [spec 2 RoPE]
    """
    B, T, _ = qkv_BTQ.shape
    turned = config.num_attention_heads + config.num_key_value_heads
    return qkv_BTQ.reshape(B, T, -1, config.head_dim)[:, :, :turned]


def attention_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    rotary: Rotary,
    past: Past | None,
    *,
    sequences: int,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, AttentionCache]:
    r"""y = W_o attention(rotate(W_q x), rotate(W_k x), W_v x), sequence by sequence.

    past: keys and values of earlier positions, which these T extend; None: there are none.

    Equation q = \mathrm{rotate}(W_q x) \\
             k = \mathrm{rotate}(W_k x) \\
             v = W_v x \\
             y = W_o\, \mathrm{norm}(\mathrm{attention}(q, k, v))
    Shapes   x_ND, rotary -> y_ND; N = sequences * T
    Source   [spec 2 attention], [spec 2 RoPE]; before the output projection [spec 2 use_sub_norm]
    """
    N = len(x_ND)
    qkv_BTQ = ops.linear(x_ND, w[QKV], None).reshape(sequences, N // sequences, -1)
    turned = turned_heads(qkv_BTQ, config)
    ops.rotate_in_place(turned, rotary.cos_YJ, rotary.sin_YJ, rotary.first_1)
    heads, log_sum_exp_BAT = split_heads(qkv_BTQ, config), None
    if past is None:
        out_BTAC, log_sum_exp_BAT = ops.attention(*heads)
    else:
        out_BTAC = ops.attention_with_cache(*heads, *past)
    normed_NI, rstd_N = out_BTAC.reshape(N, -1), None
    if config.use_sub_norm:
        normed_NI, rstd_N = ops.rms_norm(normed_NI, w[SUB_NORM], eps=config.rms_norm_eps)
    y_ND = ops.linear(normed_NI, w[OUT], None)
    return y_ND, AttentionCache(x_ND, qkv_BTQ, out_BTAC, log_sum_exp_BAT, normed_NI, rstd_N)


def attention_backward(
    dy_ND: FloatArray,
    cache: AttentionCache,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    rotary: Rotary,
    *,
    config: ModelConfig,
    ops: Operations,
) -> FloatArray:
    """Return dx_ND; add to dw. The backward of a rotation is the opposite rotation.

    For a forward without a past.

    Shapes   dy_ND, cache, rotary -> dx_ND
    Source   [spec 2 attention]
    """
    assert cache.log_sum_exp_BAT is not None
    dout_NI = ops.linear_backward(dy_ND, cache.normed_NI, w[OUT], dw[OUT], None)
    if cache.rstd_N is not None:
        out_NI = cache.out_BTAC.reshape(dout_NI.shape)
        dout_NI = ops.rms_norm_backward(dout_NI, out_NI, w[SUB_NORM], cache.rstd_N, dw[SUB_NORM])
    dqkv_BTQ = ops.empty(cache.qkv_BTQ.shape, dy_ND.dtype)
    dq_BTAC, dk_BTGC, dv_BTGC = split_heads(dqkv_BTQ, config)
    ops.attention_backward(
        dout_NI.reshape(cache.out_BTAC.shape),
        *split_heads(cache.qkv_BTQ, config),
        cache.out_BTAC,
        cache.log_sum_exp_BAT,
        dq_BTAC,
        dk_BTGC,
        dv_BTGC,
    )
    turned = turned_heads(dqkv_BTQ, config)
    ops.rotate_in_place(turned, rotary.cos_YJ, rotary.minus_sin_YJ, rotary.first_1)
    return ops.linear_backward(dqkv_BTQ.reshape(len(dy_ND), -1), cache.x_ND, w[QKV], dw[QKV], None)
