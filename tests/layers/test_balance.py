"""Router statistics and the two losses made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit.models import settings
from mhmoe_np.layers.balance import RouterStatistics, balance_loss, router_losses, z_loss
from mhmoe_np.operations.table import RouterSums
from mhmoe_np.settings.model import ModelConfig
from tests.operations.cases import DTYPES, NUMPY, SEEDS, Inputs, quick, router_sums

E, K = 5, 2


def config(**changes: Any) -> ModelConfig:
    """Two heads of two out of five experts."""
    return ModelConfig.model_validate(settings("mh2") | changes)


OF_BOTH_TYPES = pytest.mark.parametrize("kind", ["top1", "topk"])


def statistics(first: Any, choice: Any, p_sum: Any, sub_tokens: int) -> RouterStatistics:
    return RouterStatistics(
        sub_tokens, np.array(first), np.array(choice), np.array(p_sum, float), 0.0, 0
    )


def totals(r: Inputs, M: int, capacity: int | None, sums: RouterSums) -> tuple[Any, Any]:
    """Route M random sub-tokens, a third of which do not count; return p and who counts."""
    routing = NUMPY.route(r(M, E), top_k=K, normalise=True)
    sent = NUMPY.dispatch(routing.expert_MK, experts=E, capacity=capacity)
    counted_M = np.arange(M) % 3 != 1
    NUMPY.add_router_statistics(routing, sent, counted_M, sums)
    return routing, counted_M


@OF_BOTH_TYPES
def test_the_balance_loss_is_1_in_balance_and_e_where_one_expert_has_all(kind: str) -> None:
    # [spec 4 aux]
    even = statistics([4] * E, [8] * E, [4.0] * E, 20)
    assert balance_loss(even, config(router_aux_loss_type=kind)) == pytest.approx(1, rel=1e-15)
    # Whatever the shares: with even probabilities it is 1, as is with even shares any probability.
    lopsided = statistics([20, 0, 0, 0, 0], [20, 20, 0, 0, 0], [4.0] * E, 20)
    assert balance_loss(lopsided, config(router_aux_loss_type=kind)) == pytest.approx(1, rel=1e-15)
    one = statistics([20, 0, 0, 0, 0], [20, 0, 0, 0, 0], [20.0, 0, 0, 0, 0], 20)
    assert balance_loss(one, config(router_aux_loss_type=kind)) == E


def test_first_choices_count_or_all_choices() -> None:
    # [spec 4 aux]
    counts = statistics([3, 1, 0, 0, 0], [3, 1, 4, 0, 0], [2.0, 1.0, 1.0, 0, 0], 4)
    # E sum f P with f = (3, 1) / 4, then (3, 1, 4) / 8, and P = (2, 1, 1) / 4.
    top1, topk = 5 * (6 + 1) / 16, 5 * (6 + 1 + 4) / 32
    assert balance_loss(counts, config(router_aux_loss_type="top1")) == pytest.approx(top1)
    assert balance_loss(counts, config(router_aux_loss_type="topk")) == pytest.approx(topk)


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp() -> None:
    # [ST-MoE eq. 5], [spec 4 z-loss]
    r, sums, M = Inputs(1, float), router_sums(E), 30
    routing, counted_M = totals(r, M, None, sums)
    found = RouterStatistics.of(sums, int(counted_M.sum()), np.float64)
    expected = np.mean(routing.log_sum_exp_M[counted_M] ** 2)
    assert z_loss(found) == pytest.approx(expected, rel=1e-14)


@OF_BOTH_TYPES
@given(seed=SEEDS)
@quick(20)
def test_the_balance_loss_is_made_of_shares_and_mean_probabilities(kind: str, seed: int) -> None:
    # [Switch eq. 4-6], [P2 eq. 10], [spec 4 aux]
    r, sums = Inputs(seed, float), router_sums(E)
    routing, counted_M = totals(r, 30, None, sums)
    found = RouterStatistics.of(sums, int(counted_M.sum()), np.float64)
    counted = np.flatnonzero(counted_M)
    chosen = [int(e) for s in counted for e in routing.expert_MK[s, : 1 if kind == "top1" else K]]
    expected = E * sum(
        chosen.count(e) / len(chosen) * sum(routing.p_ME[s, e] for s in counted) / len(counted)
        for e in range(E)
    )
    assert balance_loss(found, config(router_aux_loss_type=kind)) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_host(dtype: Any) -> None:
    r, sums = Inputs(2, dtype), router_sums(E)
    routing, counted_M = totals(r, 30, 7, sums)
    found = RouterStatistics.of(sums, int(counted_M.sum()), dtype)
    assert found.sub_tokens == 20
    assert found.p_sum_E.dtype == dtype
    assert found.first_choice_E.dtype == found.choice_E.dtype == np.int64
    assert found.first_choice_E.sum() == 20
    assert found.choice_E.sum() == 40
    sent = NUMPY.dispatch(routing.expert_MK, experts=E, capacity=7)
    assert found.dropped == (sent.slot_MK[counted_M] < 0).sum() > 0


@OF_BOTH_TYPES
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=SEEDS)
@quick(20)
def test_statistics_of_micro_batches_add_up(kind: str, sizes: list[int], seed: int) -> None:
    # [D5]
    sums, parts = router_sums(E), []
    for i, M in enumerate(sizes):
        alone = router_sums(E)
        totals(Inputs(seed + i, float), M, None, sums)
        _, counted_M = totals(Inputs(seed + i, float), M, None, alone)
        parts.append((alone, int(counted_M.sum())))
    sub_tokens = sum(count for _, count in parts)
    whole = RouterStatistics.of(sums, sub_tokens, np.float64)
    for field in ("first_choice_E", "choice_E"):
        assert (getattr(whole, field) == sum(getattr(part, field) for part, _ in parts)).all()
    np.testing.assert_allclose(whole.p_sum_E, sum(part.p_E for part, _ in parts), rtol=1e-14)


@OF_BOTH_TYPES
@given(seed=SEEDS)
@quick(20)
def test_what_goes_back_is_the_derivative_of_the_losses(kind: str, seed: int) -> None:
    # [spec 4 aux], [spec 4 z-loss]: both are linear in sums over sub-tokens, counts being constants.
    r, sums, M = Inputs(seed, float), router_sums(E), 30
    own = config(router_aux_loss_type=kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    _, counted_M = totals(r, M, None, sums)
    sub_tokens = int(counted_M.sum())
    losses = router_losses(sums, sub_tokens, own)
    assert losses.count_E is (sums.first_choice_E if kind == "top1" else sums.choice_E)
    assert (losses.daux, losses.dz, losses.sub_tokens) == (0.3, 0.2, sub_tokens)
    assert losses.choices == losses.count_E.sum() == sub_tokens * (1 if kind == "top1" else K)

    def total(found: RouterStatistics) -> float:
        return 0.3 * balance_loss(found, own) + 0.2 * z_loss(found)

    found = RouterStatistics.of(sums, sub_tokens, np.float64)
    move = r(E)
    by_difference = total(found._replace(p_sum_E=found.p_sum_E + move)) - total(found)
    dp_E = losses.daux * E * losses.count_E / losses.choices / losses.sub_tokens
    assert by_difference == pytest.approx(float(dp_E @ move), rel=1e-9, abs=1e-12)
    square = found._replace(squared_log_sum_exp=found.squared_log_sum_exp + 1)
    assert total(square) - total(found) == pytest.approx(losses.dz / losses.sub_tokens, rel=1e-9)
