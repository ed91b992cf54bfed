"""The balance loss and the z-loss, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhmoe_np.audit.models import settings
from mhmoe_np.layers.balance import RouterStatistics, balance_loss, router_losses, z_loss
from mhmoe_np.operations.table import RouterSums
from mhmoe_np.settings.model import ModelConfig


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(settings("mh2") | {"num_experts": 4} | changes)


def _sums(first: list[float], chosen: list[float], p: list[float], squared: float) -> RouterSums:
    return RouterSums(
        np.array(first), np.array(chosen), np.array(p), np.array([0.0, 1, 0, 2]), np.array([squared])
    )


# [spec 4 balance loss]
@pytest.mark.parametrize("kind", ["top1", "topk"])
def test_a_balanced_router_has_a_balance_loss_of_one(kind: str) -> None:
    sums = _sums([3, 3, 3, 3], [6, 6, 6, 6], [3, 3, 3, 3], 0)
    statistics = RouterStatistics.of(sums, 12, np.float64)
    assert balance_loss(statistics, _config(router_aux_loss_type=kind)) == pytest.approx(1, rel=1e-15)


# [spec 4 balance loss]
def test_it_is_e_times_the_sum_of_share_times_mean_probability() -> None:
    sums = _sums([6, 2, 0, 0], [8, 4, 3, 1], [5, 1, 1, 1], 0)
    statistics = RouterStatistics.of(sums, 8, np.float64)
    # f = (3/4, 1/4, 0, 0); mean p = (5, 1, 1, 1)/8; E = 4
    assert balance_loss(statistics, _config()) == pytest.approx(4 * (15 / 4 + 1 / 4) / 8)
    # f = (8, 4, 3, 1)/16
    topk = _config(router_aux_loss_type="topk")
    assert balance_loss(statistics, topk) == pytest.approx(4 * (8 * 5 + 4 + 3 + 1) / 16 / 8)


def test_an_expert_that_takes_all_costs_as_much_as_there_are_experts() -> None:
    statistics = RouterStatistics.of(_sums([8, 0, 0, 0], [8, 0, 0, 0], [8, 0, 0, 0], 0), 8, np.float64)
    assert balance_loss(statistics, _config()) == 4


# [spec 4 z-loss]
def test_the_z_loss_is_a_mean_and_drops_are_counted() -> None:
    statistics = RouterStatistics.of(
        _sums([1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1], 6.0), 4, np.float64
    )
    assert z_loss(statistics) == 1.5
    assert statistics.dropped == 3


@pytest.mark.parametrize(("kind", "row", "choices"), [("top1", 0, 8), ("topk", 1, 16)])
def test_what_goes_back_into_the_router_is_the_counts_of_the_named_kind(
    kind: str, row: int, choices: int
) -> None:
    sums = _sums([6, 2, 0, 0], [8, 4, 3, 1], [5, 1, 1, 1], 0)
    config = _config(router_aux_loss_type=kind, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    losses = router_losses(sums, 8, config)
    assert losses.count_E is sums[row]
    assert losses.count_E.sum() == choices == losses.choices
    assert losses[2:] == (8, 0.5, 0.25)
