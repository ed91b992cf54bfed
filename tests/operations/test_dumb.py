"""The definitions themselves, against naive loops over single numbers (`dumb`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.table import BitWeight
from tests.operations import dumb
from tests.operations.cases import ACTIVATIONS, ADAMW, NUMPY, SEEDS, Inputs, packed_weight, quick

TINY = st.integers(1, 6)


def near(actual: Any, expected: Any) -> None:
    # The same few float64 operations in another order; entries are of size one to a hundred.
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=1e-12, atol=1e-12)


@given(
    M=TINY,
    E=TINY,
    K=TINY,
    load=st.sampled_from(["even", "one", "half"]),
    capacity=st.one_of(st.none(), st.integers(1, 7)),
    seed=SEEDS,
)
@quick(150)
def test_dispatch_serves_a_queue_for_each_expert(
    M: int, E: int, K: int, load: str, capacity: int | None, seed: int
) -> None:
    # [spec 4 capacity]
    expert = Inputs(seed, float).experts(M, E, min(K, E), load)
    actual = NUMPY.dispatch(expert, experts=E, capacity=capacity)
    expected = dumb.dispatch(expert.tolist(), E, capacity)
    assert tuple(part.tolist() for part in actual) == expected


@given(M=TINY, E=TINY, K=TINY, levels=st.integers(0, 3), normalise=st.booleans(), seed=SEEDS)
@quick(100)
def test_route_sorts_the_probabilities_and_keeps_ties_in_order(
    M: int, E: int, K: int, levels: int, normalise: bool, seed: int
) -> None:
    # [P2 eq. 5], [spec 3 softmax], [spec 3 K largest], [D1]
    r, K = Inputs(seed, float), min(K, E)
    logits = r.rng.integers(0, levels, (M, E)).astype(float) if levels else r(M, E)
    actual = NUMPY.route(logits, top_k=K, normalise=normalise)
    p, lse, expert, gate = dumb.route(logits.tolist(), K, normalise)
    assert actual.expert_MK.tolist() == expert
    near(actual.p_ME, p)
    near(actual.log_sum_exp_M, lse)
    near(actual.gate_MK, gate)


@given(
    M=TINY,
    U=TINY,
    F=TINY,
    E=TINY,
    K=TINY,
    capacity=st.one_of(st.none(), st.integers(1, 4)),
    sub_norm=st.booleans(),
    seed=SEEDS,
)
@quick(40)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn_is_the_gated_sum_of_the_choices_not_dropped(
    activation: Any,
    M: int,
    U: int,
    F: int,
    E: int,
    K: int,
    capacity: int | None,
    sub_norm: bool,
    seed: int,
) -> None:
    # [P1 eq. 1, 3, 5], [GLU eq. 6], [spec 3 Expert]
    r, K = Inputs(seed, float), min(K, E)
    expert = r.experts(M, E, K, "even")
    sent = NUMPY.dispatch(expert, experts=E, capacity=capacity)
    x, gate, norm = r(M, U), r(M, K), r(E, F) if sub_norm else None
    up, down = r(E, 2 * F, U), r(E, U, F)
    y, _ = NUMPY.expert_ffn(x, gate, sent, up, down, norm, activation=activation, eps=1e-5)
    near(y, dumb.expert_ffn(x, gate, expert, sent.slot_MK, up, down, norm, activation, 1e-5))
    # Quantised: float64's last bits, where the two differ, move no activation across a half.
    stacks = [BitWeight(np.rint(np.clip(w, -1, 1)), np.abs(r(*w.shape[:2]))) for w in (up, down)]
    pairs = [list(zip(stack.w, stack.beta, strict=True)) for stack in stacks]
    y, _ = NUMPY.expert_ffn(x, gate, sent, *stacks, norm, activation=activation, eps=1e-5)
    near(y, dumb.expert_ffn(x, gate, expert, sent.slot_MK, *pairs, norm, activation, 1e-5))


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
    NUMPY.rotate_in_place(x, np.cos(angle), np.sin(angle))
    near(x, expected)


@given(N=TINY, V=TINY, D=TINY, ignored=st.sampled_from([0.0, 0.4, 1.0]), seed=SEEDS)
@quick(60)
def test_token_nll_is_the_log_sum_exp_less_the_targets_logit(
    N: int, V: int, D: int, ignored: float, seed: int
) -> None:
    # [spec 4 NLL]
    r = Inputs(seed, float)
    x, w, target = r(N, D), r(V, D), r.rng.integers(0, V, N)
    target[r.rng.random(N) < ignored] = -100
    expected = dumb.token_nll(x, w, target)
    near(NUMPY.token_nll(x, w, target), expected)
    nll, _ = NUMPY.token_nll_and_gradient(x, w, target, np.zeros((V, D)), dnll=1.0)
    near(nll, expected)


@given(N=TINY, V=st.integers(1, 3), D=TINY, seed=SEEDS)
@quick(40)
def test_embedding_backward_adds_every_row_of_a_repeated_id(N: int, V: int, D: int, seed: int) -> None:
    # [spec 1 embed_tokens]
    r = Inputs(seed, float)
    dx, ids, dw = r(N, D), r.rng.integers(0, V, N), r(V, D)
    expected = dumb.embedding_backward(dx, ids, dw)
    NUMPY.embedding_backward(dx, ids, dw)
    near(dw, expected)


@given(step=st.integers(1, 2000), squares=st.sampled_from([0.5, 100.0]), seed=SEEDS)
@quick(30)
def test_adamw_updates_every_parameter_by_the_formula(step: int, squares: float, seed: int) -> None:
    # [AdamW algorithm 2], [spec 6 AdamW], [spec 6 clip]
    r = Inputs(seed, float)
    state = [r(5), r(5), r(5), r(5) ** 2]
    expected = [
        dumb.adamw(*numbers, squares, step, *ADAMW)
        for numbers in zip(*(array.tolist() for array in state), strict=True)
    ]
    NUMPY.adamw_in_place(*state, np.array([squares]), np.zeros(2), step=step, settings=ADAMW)
    parameter, gradient, first, second = state
    near(np.stack([parameter, first, second], axis=1), expected)
    assert not gradient.any()


@given(N=TINY, I=TINY, spread=st.sampled_from([0.0, 1e-7, 1.0, 1e6]), seed=SEEDS)
@quick(60)
def test_rows_are_quantised_by_their_largest_number(N: int, I: int, spread: float, seed: int) -> None:
    # [B1 eq. 4-5], [spec 5 activations]
    x = Inputs(seed, float)(N, I, spread=spread)
    q, scale = NUMPY.quantise_rows(x)
    expected = [dumb.quantise_row(row) for row in x.tolist()]
    assert q.tolist() == [row for row, _ in expected]
    assert scale.tolist() == [value for _, value in expected]


@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
@given(heights=st.lists(TINY, min_size=1, max_size=4), I=TINY, seed=SEEDS)
@quick(60)
def test_each_joined_matrix_is_quantised_by_itself(
    quantization: Any, heights: list[int], I: int, seed: int
) -> None:
    # [B1 eq. 1-3, 12], [spec 5 bitnet weights]; [B2 eq. 1-3], [spec 5 bitnet_b158 weights];
    # [spec 5 One β per matrix], [D8]
    r = Inputs(seed, float)
    start = tuple(np.cumsum([0, *heights]).tolist())
    w = r(start[-1], I) * np.repeat(np.abs(r(len(heights))), heights)[:, None]
    before = r.rng.integers(-1, 2, w.shape).astype(float)
    q, beta, report = before.copy(), np.zeros(len(w)), np.full((len(heights), 5), np.nan)
    NUMPY.quantise_weight(w, start, quantization=quantization, q_OI=q, beta_O=beta, report_X5=report)
    for x, (first, last) in enumerate(pairwise(start)):
        expected, scale = dumb.quantise_matrix(w[first:last].tolist(), quantization)
        assert q[first:last].tolist() == expected
        assert beta[first:last].tolist() == [scale] * (last - first)
        flat = [value for row in expected for value in row]
        flips = sum(a != b for a, b in zip(flat, before[first:last].ravel(), strict=True))
        assert report[x].tolist() == [scale, flat.count(-1), flat.count(0), flat.count(1), flips]


@given(N=TINY, I=TINY, O=TINY, seed=SEEDS)
@quick(60)
def test_bit_linear_multiplies_integers(N: int, I: int, O: int, seed: int) -> None:
    # [B1 eq. 11], [spec 5 BitLinear], [spec 5 integer product]
    r = Inputs(seed, float)
    w = BitWeight(r.rng.integers(-1, 2, (O, I)).astype(float), np.abs(r(O)))
    x = r(N, I)
    expected = dumb.bit_linear(x.tolist(), w.w.tolist(), w.beta.tolist())
    np.testing.assert_array_equal(NUMPY.linear(x, w, None), expected)
    np.testing.assert_array_equal(NUMPY.linear(x, packed_weight(w, "ternary-base3"), None), expected)
