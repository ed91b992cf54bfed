"""Rotary positions and causal attention with grouped key/value heads."""

from __future__ import annotations

import numpy as np

from mhmoe_np.types import FloatArray, IntArray


def rows_from(table_YJ: FloatArray, first_1: IntArray | None, count: int) -> FloatArray:
    """The rows that `Operations.rotate_in_place` takes of a table: `count` of them.

    Shapes   table_YJ, first_1? -> [T, J]
    Source   [spec 2 RoPE]
    """
    first = 0 if first_1 is None else int(first_1[0])
    return table_YJ[first : first + count]


def rotate_in_place(
    x_BTAC: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray | None
) -> None:
    """See `Operations.rotate_in_place`."""
    J = cos_YJ.shape[1]
    cos_TJ, sin_TJ = (rows_from(table_YJ, first_1, x_BTAC.shape[1]) for table_YJ in (cos_YJ, sin_YJ))
    first_BTAJ, second_BTAJ = x_BTAC[..., :J].copy(), x_BTAC[..., J:].copy()
    cos_T1J, sin_T1J = cos_TJ[:, None], sin_TJ[:, None]  # the same for all heads
    # RoPE eq. 34: (a, b) -> (a cos - b sin, b cos + a sin), here with b = C/2 places after a
    x_BTAC[..., :J] = first_BTAJ * cos_T1J - second_BTAJ * sin_T1J
    x_BTAC[..., J:] = second_BTAJ * cos_T1J + first_BTAJ * sin_T1J


def _scores(q_BTAC: FloatArray, k_BSAC: FloatArray) -> FloatArray:
    """q k^T / sqrt(C), -inf where a query would see a later key."""
    T, S, C = q_BTAC.shape[1], k_BSAC.shape[1], q_BTAC.shape[3]
    scores_BATS = np.einsum("btac,bsac->bats", q_BTAC, k_BSAC) * q_BTAC.dtype.type(C**-0.5)
    later_TS = np.arange(S) > np.arange(S - T, S)[:, None]
    return np.where(later_TS, q_BTAC.dtype.type(-np.inf), scores_BATS)


def attention(
    q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """See `Operations.attention`."""
    group = q_BTAC.shape[2] // k_BSGC.shape[2]
    k_BSAC, v_BSAC = np.repeat(k_BSGC, group, axis=2), np.repeat(v_BSGC, group, axis=2)
    scores_BATS = _scores(q_BTAC, k_BSAC)
    highest_BAT1 = scores_BATS.max(axis=3, keepdims=True)
    e_BATS = np.exp(scores_BATS - highest_BAT1)
    sum_BAT1 = e_BATS.sum(axis=3, keepdims=True)
    p_BATS = e_BATS / sum_BAT1
    # Attention eq. 1: softmax(q k^T / sqrt(C)) v
    out_BTAC = np.einsum("bats,bsac->btac", p_BATS, v_BSAC)
    log_sum_exp_BAT = (highest_BAT1 + np.log(sum_BAT1))[..., 0]
    return np.ascontiguousarray(out_BTAC), np.ascontiguousarray(log_sum_exp_BAT)


def attention_with_cache(
    q_BTAC: FloatArray,
    k_BTGC: FloatArray,
    v_BTGC: FloatArray,
    kv_BS2GC: FloatArray,
    filled_1: IntArray,
) -> FloatArray:
    """See `Operations.attention_with_cache`."""
    return attention(q_BTAC, *extended(k_BTGC, v_BTGC, kv_BS2GC, filled_1))[0]


def extended(
    k_BTGC: FloatArray, v_BTGC: FloatArray, kv_BS2GC: FloatArray, filled_1: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Put k and v behind the `filled` positions of a cache; return all keys and values, as views.

    Shapes   k_BTGC, v_BTGC, kv_BS2GC, filled_1 -> [B, filled+T, G, C], twice
    Source   [spec 2 attention]
    """
    T, G = k_BTGC.shape[1:3]
    filled = int(filled_1[0])
    last = filled + T
    kv_BS2GC[:, filled:last, :G] = k_BTGC
    kv_BS2GC[:, filled:last, G:] = v_BTGC
    return kv_BS2GC[:, :last, :G], kv_BS2GC[:, :last, G:]


def attention_backward(
    dout_BTAC: FloatArray,
    q_BTAC: FloatArray,
    k_BTGC: FloatArray,
    v_BTGC: FloatArray,
    out_BTAC: FloatArray,
    log_sum_exp_BAT: FloatArray,
    dq_BTAC: FloatArray,
    dk_BTGC: FloatArray,
    dv_BTGC: FloatArray,
) -> None:
    """See `Operations.attention_backward`.

    out = p v with p = softmax(s), s = q k^T c, c = C^(-1/2). Per head:
    dv = p^T dout;  dp = dout v^T;  ds = p (dp - sum_s(dp p)), where sum_s(dp p) = dout . out;
    dq = c ds k;  dk = c ds^T q. A key/value head sums over the attention heads that read it.
    """
    B, T, G, C = k_BTGC.shape
    group = q_BTAC.shape[2] // G
    k_BSAC, v_BSAC = np.repeat(k_BTGC, group, axis=2), np.repeat(v_BTGC, group, axis=2)
    p_BATS = np.exp(_scores(q_BTAC, k_BSAC) - log_sum_exp_BAT[..., None])
    dp_BATS = np.einsum("btac,bsac->bats", dout_BTAC, v_BSAC)
    dot_BAT = np.einsum("btac,btac->bat", dout_BTAC, out_BTAC)
    ds_BATS = p_BATS * (dp_BATS - dot_BAT[..., None]) * q_BTAC.dtype.type(C**-0.5)
    dq_BTAC[...] = np.einsum("bats,bsac->btac", ds_BATS, k_BSAC)
    dk_BSAC = np.einsum("bats,btac->bsac", ds_BATS, q_BTAC)
    dv_BSAC = np.einsum("bats,btac->bsac", p_BATS, dout_BTAC)
    dk_BTGC[...] = dk_BSAC.reshape(B, T, G, group, C).sum(axis=3)
    dv_BTGC[...] = dv_BSAC.reshape(B, T, G, group, C).sum(axis=3)
