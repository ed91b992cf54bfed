"""How the next token is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from mhmoe_np.inference.generate import Sampling, next_token

P = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(P).astype(np.float32)


def _drawn(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    """The share of each token."""
    rng = np.random.default_rng(sampling.seed)
    tokens = [next_token(LOGITS, sampling, rng) for _ in range(draws)]
    return np.bincount(tokens, minlength=len(P)) / draws


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_shares_are_those_of_the_softmax_at_that_temperature(temperature: float) -> None:
    expected = P ** (1 / temperature)
    expected /= expected.sum()
    # Five standard deviations of a share of one half.
    assert np.abs(_drawn(Sampling(temperature)) - expected).max() < 5 * 0.5 / np.sqrt(4000)


def test_temperature_zero_takes_the_most_probable_and_of_equals_the_lower_id() -> None:
    rng = np.random.default_rng(0)
    assert next_token(LOGITS, Sampling(0), rng) == 1
    assert next_token(np.array([1.0, 3, 2, 3]), Sampling(0), rng) == 1


def test_top_k_draws_from_the_k_most_probable_alone() -> None:
    share = _drawn(Sampling(top_k=2))
    assert set(np.flatnonzero(share)) == {1, 3}
    assert share[1] == pytest.approx(0.4 / 0.65, abs=0.04)


def test_top_k_of_equal_logits_keeps_the_lower_ids() -> None:
    rng = np.random.default_rng(1)
    logits = np.zeros(6, np.float32)
    assert {next_token(logits, Sampling(top_k=3), rng) for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.3, {1}),
        (0.41, {1, 3}),
        (0.6, {1, 3}),
        (0.66, {1, 3, 4}),
        (0.9, {0, 1, 3, 4}),
        (1.0, set(range(5))),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, nucleus: set[int]) -> None:
    assert set(np.flatnonzero(_drawn(Sampling(top_p=top_p)))) == nucleus


def test_top_k_comes_before_top_p() -> None:
    # Of the two most probable, renormalised: 0.615 and 0.385.
    assert set(np.flatnonzero(_drawn(Sampling(top_k=2, top_p=0.6)))) == {1}
    assert set(np.flatnonzero(_drawn(Sampling(top_k=2, top_p=0.7)))) == {1, 3}


def test_a_seed_gives_its_tokens_again() -> None:
    assert (_drawn(Sampling(seed=3), 50) == _drawn(Sampling(seed=3), 50)).all()
