"""Rotary positions and causal attention with grouped key/value heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    FAST,
    LENGTHS,
    NUMPY,
    SEEDS,
    TINY,
    Inputs,
    agree,
    always,
    heads,
    is_the_derivative,
    near,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    quick,
    same_bits,
    unchanged,
)

# ---- the definition --------------------------------------------------------------------------


@given(
    B=st.integers(1, 2),
    T=TINY,
    earlier=st.integers(0, 4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)]),
    C=TINY,
    seed=SEEDS,
)
@quick(60)
def test_attention_is_the_softmax_mean_of_the_values_seen(
    B: int, T: int, earlier: int, heads: tuple[int, int], C: int, seed: int
) -> None:
    # [Attention eq. 1], [spec 2 attention]
    r, (A, G), S = Inputs(seed, float), heads, T + earlier
    q, k, v = r(B, T, A, C), r(B, S, G, C), r(B, S, G, C)
    out, lse = NUMPY.attention(q, k, v)
    expected_out, expected_lse = dumb.attention(q.tolist(), k.tolist(), v.tolist())
    near(out, expected_out)
    near(lse, expected_lse)


@given(B=st.integers(1, 2), T=TINY, A=TINY, J=TINY, seed=SEEDS)
@quick(30)
def test_rotation_is_a_complex_product(B: int, T: int, A: int, J: int, seed: int) -> None:
    # [RoPE eq. 34], [spec 2 RoPE]
    r = Inputs(seed, float)
    x, angle = r(B, T, A, 2 * J), r(T, J, spread=3.0)
    expected = dumb.rotate(x.tolist(), np.cos(angle), np.sin(angle))
    NUMPY.rotate_in_place(x, np.cos(angle), np.sin(angle), None)
    near(x, expected)


# ---- one backend and the other ---------------------------------------------------------------

GROUPS = st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)])
# Around the 64 query rows of a task.
LATEST = [{"T": T, "S": S} for T in (63, 64, 65, 129) for S in (T, T + 66)]
LATEST += [{"T": 1, "S": S} for S in (1, 2, 65, 128)]


@of_each_fast_backend
@of_each_dtype
@given(B=st.integers(1, 3), T=LENGTHS, A=st.integers(1, 4), J=st.integers(1, 5), seed=SEEDS)
@quick(20)
def test_rotate_in_place_agrees(
    name: str, dtype: Any, B: int, T: int, A: int, J: int, seed: int
) -> None:
    r = Inputs(seed, dtype)
    whole, cos, sin = r(B, T, A + 2, 2 * J), r(T, J), r(T, J)
    expected, actual = whole.copy(), whole.copy()
    first, second = np.abs(whole[..., :J]), np.abs(whole[..., J:])
    c, s = np.abs(cos)[:, None], np.abs(sin)[:, None]
    size = np.concatenate([first * c + second * s, second * c + first * s], axis=3)
    with unchanged(cos, sin):
        NUMPY.rotate_in_place(expected[:, :, :A], cos, sin, None)
        FAST[name].rotate_in_place(actual[:, :, :A], cos, sin, None)
    agree(actual, expected, size)
    np.testing.assert_array_equal(actual[:, :, A:], whole[:, :, A:])  # the other heads stay


class Sizes:
    """What is added up in attention, number by number.

    A score is off in proportion to Z = sum_c |q k| / sqrt(C), and its probability by as much: hence
    everything that p is multiplied with has 1 + Z of the likeliest key times its own size.
    """

    def __init__(self, q: Any, k: Any, v: Any) -> None:
        group = q.shape[2] // k.shape[2]
        self.group = group
        self.q, self.k, self.v = (np.abs(x).astype(float) for x in (q, *self.repeated(k, v)))
        T, S = q.shape[1], k.shape[1]
        seen_TS = np.arange(S) <= np.arange(S - T, S)[:, None]
        self.scale = q.shape[3] ** -0.5
        z_BATS = np.einsum("btac,bsac->bats", self.q, self.k) * self.scale
        self.z_BAT = 1 + np.where(seen_TS, z_BATS, 0).max(axis=3)
        score_BATS = np.einsum("btac,bsac->bats", q, self.repeated(k)[0]).astype(float) * self.scale
        e_BATS = np.where(seen_TS, np.exp(score_BATS - score_BATS.max(axis=3, keepdims=True)), 0)
        self.p_BATS = e_BATS / e_BATS.sum(axis=3, keepdims=True) * self.z_BAT[..., None]

    def repeated(self, *arrays: Any) -> list[Any]:
        return [np.repeat(x, self.group, axis=2) for x in arrays]

    def forward(self) -> tuple[Any, Any]:
        """Of out and log-sum-exp."""
        return np.einsum("bats,bsac->btac", self.p_BATS, self.v), self.z_BAT

    def backward(self, dout: Any, out: Any) -> tuple[Any, Any, Any]:
        """Of dq, dk and dv: ds = p (dout v - dout out) cancels, wholly so where one key is seen."""
        dout, out = np.abs(dout).astype(float), np.abs(out)
        B, T, A, C = dout.shape
        dp_BATS = np.einsum("btac,bsac->bats", dout, self.v)
        ds_BATS = self.p_BATS * (dp_BATS + np.einsum("btac,btac->bat", dout, out)[..., None])
        dk = np.einsum("bats,btac->bsac", ds_BATS, self.q)
        dv = np.einsum("bats,btac->bsac", self.p_BATS, dout)
        dk, dv = (x.reshape(B, T, A // self.group, self.group, C).sum(axis=3) for x in (dk, dv))
        dq = np.einsum("bats,bsac->btac", ds_BATS, self.k)
        return dq * self.scale, dk * self.scale, dv


@of_each_fast_backend
@of_each_dtype
@always([size | {"B": 2, "group": (4, 2), "C": 6, "seed": 6} for size in LATEST])
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    S=st.integers(1, 40),
    group=GROUPS,
    C=st.integers(1, 12),
    seed=SEEDS,
)
@quick(20)
def test_attention_agrees(
    name: str, dtype: Any, B: int, T: int, S: int, group: tuple[int, int], C: int, seed: int
) -> None:
    T, (A, G) = min(T, S), group
    q, k, v = Inputs(seed, dtype).joint(B, S, A, G, C)
    q = q[:, S - T :]
    with unchanged(q, k, v):
        agree(FAST[name].attention(q, k, v), NUMPY.attention(q, k, v), *Sizes(q, k, v).forward())


@of_each_fast_backend
@of_each_dtype
@pytest.mark.parametrize(("S", "room"), [(1, 5), (64, 70), (65, 65)])
def test_attention_of_one_position_to_a_longer_cache_agrees(
    name: str, dtype: Any, S: int, room: int
) -> None:
    # As in generation: the keys and values are the filled part of a cache of another layout.
    r = Inputs(20, dtype)
    q, _, _ = r.joint(2, 1, 4, 2, 6)
    kv = r(2, room, 4, 6)
    k, v = kv[:, :S, :2], kv[:, :S, 2:]
    agree(FAST[name].attention(q, k, v), NUMPY.attention(q, k, v), *Sizes(q, k, v).forward())


@of_each_fast_backend
@of_each_dtype
@always([{"B": 2, "T": T, "group": (4, 2), "C": 6, "seed": 7} for T in (1, 63, 64, 65, 129)])
@given(B=st.integers(1, 3), T=st.integers(1, 40), group=GROUPS, C=st.integers(1, 12), seed=SEEDS)
@quick(20)
def test_attention_backward_agrees(
    name: str, dtype: Any, B: int, T: int, group: tuple[int, int], C: int, seed: int
) -> None:
    r, (A, G) = Inputs(seed, dtype), group
    q, k, v = r.joint(B, T, A, G, C)
    out, log_sum_exp = NUMPY.attention(q, k, v)
    dout = r(B, T, A, C)
    # Written, not added: what the arrays held before must not matter.
    expected, actual = r(B, T, A + 2 * G, C), r(B, T, A + 2 * G, C)
    given_arrays = (dout, q, k, v, out, log_sum_exp)
    with unchanged(*given_arrays):
        NUMPY.attention_backward(*given_arrays, *heads(expected, A, G))
        FAST[name].attention_backward(*given_arrays, *heads(actual, A, G))
    sizes = Sizes(q, k, v).backward(dout, out)
    agree(heads(actual, A, G), heads(expected, A, G), *sizes)


# ---- gradients -------------------------------------------------------------------------------


@of_each_backend
def test_the_opposite_rotation_is_the_derivative_of_a_rotation(name: str) -> None:
    is_the_derivative(operation_checks.rotate(BACKENDS[name], np.random.default_rng(23)))


@of_each_backend
@pytest.mark.parametrize(("A", "G"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("T", [2, 6, 66])
def test_attention_backward_is_the_derivative(name: str, T: int, A: int, G: int) -> None:
    rng = np.random.default_rng(24)
    is_the_derivative(operation_checks.attention(BACKENDS[name], rng, positions=T, heads=(A, G)))


@of_each_backend
@pytest.mark.parametrize(("A", "G"), [(2, 2), (4, 2), (3, 1)])
def test_a_single_position_sees_itself_alone(name: str, A: int, G: int) -> None:
    # Its output is its value, on which query and key have no effect: 0 by calculus, up to rounding.
    r, ops = Inputs(24, float), BACKENDS[name]
    q, k, v = r.joint(2, 1, A, G, 4)
    dout, dqkv = r(2, 1, A, 4), r(2, 1, A + 2 * G, 4)
    out, log_sum_exp = ops.attention(q, k, v)
    near(out, np.repeat(v, A // G, axis=2))
    ops.attention_backward(dout, q, k, v, out, log_sum_exp, *heads(dqkv, A, G))
    dq, dk, dv = heads(dqkv, A, G)
    near(dq, np.zeros_like(dq))
    near(dk, np.zeros_like(dk))
    near(dv, dout.reshape(2, 1, G, A // G, 4).sum(axis=3))


# ---- special promises ------------------------------------------------------------------------


@of_each_backend
@of_each_dtype
@pytest.mark.parametrize("t", [0, 1, 62, 63, 64, 100, 128])
def test_a_later_key_or_value_leaves_earlier_outputs_as_they_are(name: str, dtype: Any, t: int) -> None:
    r, ops = Inputs(56, dtype), BACKENDS[name]
    q, k, v = r.joint(2, 130, 4, 2, 6)
    out, lse = ops.attention(q, k, v)
    out, lse = out.copy(), lse.copy()
    k[:, t + 1 :] += r(2, 129 - t, 2, 6)
    v[:, t + 1 :] += r(2, 129 - t, 2, 6)
    now, now_lse = ops.attention(q, k, v)
    same_bits([now[:, : t + 1], now_lse[:, :, : t + 1]], [out[:, : t + 1], lse[:, :, : t + 1]])
    assert (now[:, t + 1 :] != out[:, t + 1 :]).any(axis=(2, 3)).all()


@of_each_backend
@of_each_dtype
def test_attention_to_equal_values_returns_them(name: str, dtype: Any) -> None:
    # The weights of the keys seen sum to one, so a mean of equal values is that value.
    q, k, v = Inputs(57, dtype).joint(2, 67, 4, 2, 6)
    v[...] = 3
    out, _ = BACKENDS[name].attention(q, k, v)
    np.testing.assert_allclose(out, 3, rtol=67 * np.finfo(dtype).eps)
