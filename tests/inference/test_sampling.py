"""How the next token is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.inference.generate import Sampling, generate, next_token
from tests.operations.cases import SEEDS, Inputs, quick


class Recorder:
    """In the place of a generator: takes the first, and keeps what it was to draw from."""

    def choice(self, count: int, p: Any) -> int:
        assert count == len(p)
        self.p = p
        return 0


def drawn_from(logits: Any, sampling: Sampling) -> dict[int, float]:
    """Every token that can be drawn and its probability, the most probable first."""
    recorder, logits = Recorder(), np.array(logits)
    tokens = []
    first = next_token(logits, sampling, recorder)  # type: ignore[arg-type]
    for i in range(len(recorder.p)):
        recorder.choice = lambda count, p, i=i: i  # type: ignore[method-assign]
        tokens.append(next_token(logits, sampling, recorder))  # type: ignore[arg-type]
    assert tokens[0] == first
    assert len(set(tokens)) == len(tokens)
    return dict(zip(tokens, recorder.p.tolist(), strict=True))


LOGITS = [0.5, 2.0, -1.0, 2.0, 1.0]


def softmax(logits: Any, temperature: float = 1.0) -> Any:
    e = np.exp((np.array(logits, float) - max(logits)) / temperature)
    return e / e.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_without_limits_all_tokens_have_the_probabilities_of_the_softmax(
    dtype: Any, temperature: float
) -> None:
    found = drawn_from(np.array(LOGITS, dtype), Sampling(temperature=temperature))
    assert list(found) == [1, 3, 4, 0, 2]  # equal ones by their ids
    p = softmax(LOGITS, temperature)
    assert found == pytest.approx({token: p[token] for token in found}, rel=1e-12)


def test_temperature_0_takes_the_largest_and_of_equal_ones_the_first() -> None:
    rng = np.random.default_rng(0)
    for top_p in (None, 0.1, 1.0):
        sampling = Sampling(temperature=0, top_p=top_p, top_k=3)
        assert next_token(np.array(LOGITS), sampling, rng) == 1
        assert next_token(np.zeros(4), sampling, rng) == 0


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (9, [1, 3, 4, 0, 2])]
)
def test_top_k_leaves_the_k_most_probable(top_k: int, tokens: list[int]) -> None:
    found = drawn_from(LOGITS, Sampling(top_k=top_k))
    assert list(found) == tokens
    p = softmax(LOGITS)[tokens]
    assert list(found.values()) == pytest.approx(list(p / p.sum()), rel=1e-12)


@given(
    V=st.integers(1, 12),
    top_p=st.floats(0.001, 1.0),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    seed=SEEDS,
)
@quick(200)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(
    V: int, top_p: float, temperature: float, seed: int
) -> None:
    logits = Inputs(seed, float)(V, spread=3.0)
    found = drawn_from(logits, Sampling(temperature=temperature, top_p=top_p))
    p = softmax(logits, temperature)
    order = np.argsort(-p, kind="stable")
    assert list(found) == order[: len(found)].tolist()
    reached = float(p[list(found)].sum())
    assert reached >= top_p - 1e-12
    # One token fewer would not reach it.
    assert reached - p[order[len(found) - 1]] < top_p + 1e-12
    assert list(found.values()) == pytest.approx((p[list(found)] / reached).tolist(), rel=1e-9)


def test_a_nucleus_that_is_just_reached_takes_no_more() -> None:
    # Probabilities of 1/4 each, exactly.
    for top_p, size in ((0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        assert list(drawn_from(np.zeros(4), Sampling(top_p=top_p))) == [0, 1, 2, 3][:size]


def test_top_p_is_of_what_top_k_leaves() -> None:
    # Of 4 equal tokens 2 are left, with 1/2 each.
    assert list(drawn_from(np.zeros(4), Sampling(top_k=2, top_p=0.5))) == [0]
    assert list(drawn_from(np.zeros(4), Sampling(top_k=2, top_p=0.6))) == [0, 1]


def test_tokens_are_drawn_as_often_as_is_probable() -> None:
    rng, draws = np.random.default_rng(5), 20_000
    sampling = Sampling(temperature=1.5, top_p=0.9)
    expected = drawn_from(LOGITS, sampling)
    counts = np.bincount(
        [next_token(np.array(LOGITS), sampling, rng) for _ in range(draws)], minlength=len(LOGITS)
    )
    for token in range(len(LOGITS)):
        p = expected.get(token, 0.0)
        # Five standard deviations of a binomial count.
        assert abs(counts[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


def test_a_seed_gives_its_tokens_again() -> None:
    runs = []
    for seed in (3, 3, 4):
        rng = np.random.default_rng(seed)
        runs.append([next_token(np.array(LOGITS), Sampling(), rng) for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_logits_of_any_size_have_probabilities(size: float) -> None:
    found = drawn_from(np.array([-size, size, 0.0]), Sampling())
    assert found == {1: 1.0, 2: 0.0, 0: 0.0}


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e308])
def test_a_temperature_at_either_end_of_the_floats_has_probabilities(temperature: float) -> None:
    found = drawn_from([0.5, 2.0, -1.0, 1e30], Sampling(temperature=temperature))
    assert found[3] == pytest.approx(1.0 if temperature < 1 else 0.25)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "sampling",
    [
        *(Sampling(temperature=t) for t in (float("nan"), float("inf"), -1.0)),
        *(Sampling(top_p=p) for p in (float("nan"), float("inf"), 0.0, 1.5)),
    ],
)
def test_sampling_that_is_none_is_refused_before_anything_is_computed(sampling: Sampling) -> None:
    anything: Any = None
    with pytest.raises(UserError, match=r"temperature: |top_p: "):
        generate(anything, anything, "a", max_new_tokens=1, sampling=sampling, ops=anything)
