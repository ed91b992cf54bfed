"""The router: probabilities, the experts chosen and their gates, and what is counted of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from tests.operations import dumb
from tests.operations.cases import (
    ALL_CHOICES,
    BACKENDS,
    CUDA,
    EDGES,
    FAST,
    LENGTHS,
    NUMPY,
    SEEDS,
    TINY,
    Inputs,
    agree,
    always,
    choices,
    is_the_derivative,
    near,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    of_the_device,
    quick,
    router_losses,
    router_sums,
    same_bits,
    unchanged,
)

# ---- the definition --------------------------------------------------------------------------


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
    E=TINY,
    K=TINY,
    capacity=st.one_of(st.none(), st.integers(1, 4)),
    counted=st.sampled_from([0.0, 0.5, 1.0]),
    seed=SEEDS,
)
@quick(60)
def test_statistics_count_the_choices_of_the_counted_sub_tokens(
    M: int, E: int, K: int, capacity: int | None, counted: float, seed: int
) -> None:
    # [spec 4 aux], [spec 4 z-loss]
    r, K = Inputs(seed, float), min(K, E)
    routing = NUMPY.route(r(M, E), top_k=K, normalise=True)
    sent = NUMPY.dispatch(routing.expert_MK, experts=E, capacity=capacity)
    counted_M = r.rng.random(M) < counted
    totals = router_sums(E)
    for array in totals:
        array[...] = 5
    NUMPY.add_router_statistics(routing, sent, counted_M, totals)
    first, choice, p, dropped, squares = dumb.router_statistics(
        *(routing.p_ME, routing.log_sum_exp_M, routing.expert_MK, sent.slot_MK, counted_M)
    )
    assert (totals.first_choice_E - 5).tolist() == first
    assert (totals.choice_E - 5).tolist() == choice
    assert (totals.dropped_E - 5).tolist() == dropped
    near(totals.p_E - 5, p)
    near(totals.squared_log_sum_exp_1 - 5, [squares])


# ---- one backend and the other ---------------------------------------------------------------

# Around 32, 64, 128 and 256 experts, up to which a warp of a GPU keeps a row in registers.
WIDE = [(32, 32), (33, 2), (64, 5), (65, 1), (128, 2), (129, 3), (256, 2), (257, 4), (600, 33)]


@of_each_fast_backend
@of_each_dtype
@always([{"M": M, "choice": (6, 2), "levels": 2, "seed": 10} for M in EDGES])
@always([{"M": 9, "choice": c, "levels": n, "seed": 14} for c in WIDE for n in (0, 2)])
@always([{"M": 70, "choice": c, "levels": n, "seed": 11} for c in ALL_CHOICES for n in (0, 1, 3)])
@given(M=LENGTHS, choice=choices(), levels=st.integers(0, 3), seed=SEEDS)
@quick(20)
@pytest.mark.parametrize("normalise", [False, True])
def test_route_agrees(
    name: str, dtype: Any, normalise: bool, M: int, choice: tuple[int, int], levels: int, seed: int
) -> None:
    r, (E, K), ops = Inputs(seed, dtype), choice, FAST[name]
    # With few levels, probabilities tie exactly (levels = 1: all of them); 0 means no levels.
    logits = r.rng.integers(0, levels, (M, E)).astype(dtype) if levels else r(M, E, spread=3.0)
    with unchanged(logits):
        expected = NUMPY.route(logits, top_k=K, normalise=normalise)
        actual = ops.route(logits, top_k=K, normalise=normalise)
    # The log-sum-exp is the largest logit and a logarithm, which may cancel.
    agree(actual, expected, 0, np.abs(logits).max(axis=1) + 1)
    # The tie rule: of equal logits the lower index comes first.
    lower_first = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(actual.expert_MK, lower_first)

    dgate, counted = r(M, K), r.rng.random(M) < 0.7
    losses = router_losses(r, E, counted)
    with unchanged(dgate, *expected, counted, losses.count_E):
        agree(
            ops.route_backward(dgate, expected, counted, losses, normalise=normalise),
            NUMPY.route_backward(dgate, expected, counted, losses, normalise=normalise),
            backward_size(dgate, expected, counted, losses, normalise),
        )


def backward_size(dgate: Any, routing: Any, counted: Any, losses: Any, normalise: bool) -> Any:
    """What is added up in dlogits = p (dp - sum(dp p) + dlse)."""
    p, lse, expert, gate = routing
    dgate, rows = np.abs(dgate), np.arange(len(p))[:, None]
    dchosen = dgate
    if normalise:
        pull = (dgate * gate).sum(axis=1, keepdims=True)
        dchosen = (dgate + pull) / p[rows, expert].sum(axis=1, keepdims=True)
    share = losses.count_E / losses.choices
    dp = counted[:, None] * (losses.daux * len(share) * share / losses.sub_tokens)
    dp[rows, expert] += dchosen
    dlse = counted * np.abs(lse) * 2 * losses.dz / losses.sub_tokens
    return p * (dp + (dp * p).sum(axis=1, keepdims=True) + dlse[:, None])


@of_each_fast_backend
@of_each_dtype
@always([{"M": M, "choice": (6, 2), "capacity": 20, "seed": 12} for M in EDGES])
@always([{"M": 520, "choice": c, "capacity": 40, "seed": 15} for c in ((33, 3), (1, 1))])
@given(
    M=LENGTHS,
    choice=choices(),
    capacity=st.one_of(st.none(), st.integers(1, 60)),
    seed=SEEDS,
)
@quick(20)
def test_statistics_agree(
    name: str, dtype: Any, M: int, choice: tuple[int, int], capacity: int | None, seed: int
) -> None:
    r, (E, K) = Inputs(seed, dtype), choice
    routing = NUMPY.route(r(M, E), top_k=K, normalise=True)
    sent = NUMPY.dispatch(routing.expert_MK, experts=E, capacity=capacity)
    counted = r.rng.random(M) < 0.7
    expected, actual = router_sums(E), router_sums(E)
    with unchanged(*routing, *sent, counted):
        for ops, totals in ((NUMPY, expected), (FAST[name], actual)):
            for _ in range(2):  # going on, as in a step of several micro-batches
                ops.add_router_statistics(routing, sent, counted, totals)
    for field in ("first_choice_E", "choice_E", "dropped_E"):
        same_bits(getattr(actual, field), getattr(expected, field))
    # p is added up in its own dtype; all terms are positive.
    agree(actual.p_E.astype(dtype), expected.p_E.astype(dtype))
    np.testing.assert_array_equal(actual.p_E.astype(dtype), actual.p_E)
    agree(actual.squared_log_sum_exp_1.astype(dtype), expected.squared_log_sum_exp_1.astype(dtype))


# ---- gradients -------------------------------------------------------------------------------


@of_each_backend
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("E", "K"), [(5, 2), (4, 4), (6, 1)])
def test_route_backward_is_the_derivative_where_the_choice_holds(
    name: str, E: int, K: int, normalise: bool
) -> None:
    # [spec 3 softmax], [Switch eq. 4], [spec 4 aux], [ST-MoE eq. 5], [spec 4 z-loss]
    rng = np.random.default_rng(26)
    is_the_derivative(
        operation_checks.route(BACKENDS[name], rng, normalise=normalise, experts=E, top_k=K)
    )


# ---- special promises ------------------------------------------------------------------------


@of_each_dtype
@given(M=st.integers(1, 80), E=st.integers(1, 70), seed=SEEDS)
@quick(25)
def test_the_routers_probabilities_and_normalised_gates_sum_to_one(
    dtype: Any, M: int, E: int, seed: int
) -> None:
    r = Inputs(seed, dtype)
    for backend in BACKENDS.values():
        routing = backend.route(r(M, E, spread=20.0), top_k=min(E, 3), normalise=True)
        # Each addend and the sum itself are rounded: E roundings at the very most.
        atol = (E + 4) * np.finfo(dtype).eps
        for weights in (routing.p_ME, routing.gate_MK):
            assert (weights >= 0).all()
            np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=atol)
        assert (np.diff(routing.gate_MK, axis=1) <= 0).all()  # most probable first


@of_each_fast_backend
@of_each_dtype
@given(
    M=st.integers(1, 80),
    E=st.integers(1, 9),
    K=st.integers(1, 9),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    share=st.sampled_from([0.2, 1.0]),
    seed=SEEDS,
)
@quick(50)
def test_logits_that_are_not_numbers_still_choose_valid_experts(
    name: str, dtype: Any, M: int, E: int, K: int, bad: float, share: float, seed: int
) -> None:
    # An index out of range would make the compiled dispatch write outside its arrays.
    r, K = Inputs(seed, dtype), min(K, E)
    logits = r(M, E)
    logits[r.rng.random((M, E)) < share] = bad
    expert = FAST[name].route(logits, top_k=K, normalise=True).expert_MK
    assert ((expert >= 0) & (expert < E)).all()
    assert all(len(set(row)) == K for row in expert.tolist())


@of_each_backend
@of_each_dtype
@pytest.mark.parametrize("E", [5, 40])
def test_what_is_not_counted_adds_nothing_to_the_statistics_whatever_it_is(
    name: str, dtype: Any, E: int
) -> None:
    # [D12]
    counted, logits = np.arange(9) != 4, Inputs(27, dtype)(9, E)
    totals = []
    for number in (0.0, math.nan):
        logits[4] = number
        routing = BACKENDS[name].route(logits, top_k=3, normalise=True)
        sent = NUMPY.dispatch(routing.expert_MK, experts=E, capacity=None)
        totals.append(router_sums(E))
        BACKENDS[name].add_router_statistics(routing, sent, counted, totals[-1])
    for healthy, beside in zip(*totals, strict=True):
        same_bits(beside, healthy)


@of_each_fast_backend
@of_each_dtype
@pytest.mark.parametrize("E", [5, 40, 300])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_row_with_a_number_that_is_not_one_chooses_the_first_experts(
    name: str, dtype: Any, E: int, normalise: bool
) -> None:
    # [D12]: the other rows know nothing of it.
    r, ops, K = Inputs(64, dtype), FAST[name], 3
    logits = r(9, E)
    clean = ops.route(logits, top_k=K, normalise=normalise)
    logits[2, E - 1], logits[5, 0] = math.nan, math.inf
    found = ops.route(logits, top_k=K, normalise=normalise)
    np.testing.assert_array_equal(found.expert_MK[[2, 5]], [[0, 1, 2]] * 2)
    for array in (found.p_ME, found.log_sum_exp_M, found.gate_MK):
        assert np.isnan(array[[2, 5]]).all()
    others = np.setdiff1d(np.arange(9), [2, 5])
    same_bits([part[others] for part in found], [part[others] for part in clean])


@of_the_device
@of_each_dtype
def test_the_order_of_threads_does_not_show(dtype: Any) -> None:
    # Where the backend is emulated each call has its threads in another order.
    r, (M, E, K) = Inputs(65, dtype), (300, 40, 3)
    logits, dgate, counted = r(M, E), r(M, K), r.rng.random(M) < 0.7
    losses = router_losses(r, E, counted)
    results = []
    for _ in range(3):
        routing, sums = CUDA.route(logits, top_k=K, normalise=True), router_sums(E)
        sent = CUDA.dispatch(routing.expert_MK, experts=E, capacity=20)
        CUDA.add_router_statistics(routing, sent, counted, sums)
        back = CUDA.route_backward(dgate, routing, counted, losses, normalise=True)
        results.append([*routing, *sent, *sums, back])
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


@of_the_device
def test_no_rows_leave_the_statistics_as_they_are() -> None:
    E, none = 5, np.zeros((0, 2))
    routing = CUDA.route(np.zeros((0, E)), top_k=2, normalise=True)
    sent = CUDA.dispatch(routing.expert_MK, experts=E, capacity=None)
    assert (len(sent.route_R), sent.start_Z.tolist()) == (0, [0] * (E + 1))
    sums = router_sums(E)
    for array in sums:
        array[...] = 5
    CUDA.add_router_statistics(routing, sent, np.zeros(0, np.bool_), sums)
    assert all((array == 5).all() for array in sums)
    losses = router_losses(Inputs(66, float), E, np.zeros(1))
    back = CUDA.route_backward(none, routing, np.zeros(0, np.bool_), losses, normalise=True)
    assert back.shape == (0, E)
