"""How the next token is drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.inference.generate import generate
from mhmoe_np.inference.sampling import (
    Sampling,
    candidates,
    min_p_size,
    next_token,
    nucleus_size,
    penalised,
)
from tests.operations.cases import SEEDS, Inputs, quick

NOTHING = np.zeros(0, np.int64)


def drawn_from(logits: Any, sampling: Sampling, seen: Any = NOTHING) -> dict[int, float]:
    """Every token that can be drawn and its probability, the most probable first."""
    tokens, p = candidates(np.array(logits), sampling, np.array(seen))
    assert len(tokens) == len(p) == len(set(tokens.tolist()))
    return dict(zip(tokens.tolist(), p.tolist(), strict=True))


def drawn(logits: Any, sampling: Sampling, rng: np.random.Generator) -> int:
    return next_token(np.array(logits), sampling, NOTHING, rng)


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
        assert drawn(LOGITS, sampling, rng) == 1
        assert drawn(np.zeros(4), sampling, rng) == 0


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
    counts = np.bincount([drawn(LOGITS, sampling, rng) for _ in range(draws)], minlength=len(LOGITS))
    for token in range(len(LOGITS)):
        p = expected.get(token, 0.0)
        # Five standard deviations of a binomial count.
        assert abs(counts[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


def test_a_seed_gives_its_tokens_again() -> None:
    runs = []
    for seed in (3, 3, 4):
        rng = np.random.default_rng(seed)
        runs.append([drawn(LOGITS, Sampling(), rng) for _ in range(50)])
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
        *(Sampling(top_k=k) for k in (0, -1)),
        *(Sampling(min_p=p) for p in (float("nan"), -0.1, 1.5)),
        *(Sampling(repetition_penalty=x) for x in (float("nan"), float("inf"), 0.0, -1.0, 1e31)),
    ],
)
def test_sampling_that_is_none_is_refused_before_anything_is_computed(sampling: Sampling) -> None:
    anything: Any = None
    model: Any = SimpleNamespace(config=None)
    with pytest.raises(UserError, match=r"^(temperature|top_p|top_k|min_p|repetition_penalty): "):
        generate(model, anything, "a", max_new_tokens=1, sampling=sampling, ops=anything)


# ---- each filter by hand -------------------------------------------------------------------------


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    logits = np.array([3.0, -3.0, 0.0, 3.0, -3.0], np.float32)
    # Token 0 was seen three times and counts once; token 9 the logits lack.
    found = penalised(logits, np.array([0, 1, 0, 2, 0, 9]), 1.5)
    assert found.tolist() == [2.0, -4.5, 0.0, 3.0, -3.0]
    assert logits.tolist() == [3.0, -3.0, 0.0, 3.0, -3.0]
    assert penalised(logits, np.array([0, 1]), 0.5).tolist() == [6.0, -1.5, 0.0, 3.0, -3.0]


def test_a_repetition_penalty_counts_where_the_most_probable_token_is_taken() -> None:
    sampling, rng = Sampling(temperature=0, repetition_penalty=2.0), np.random.default_rng(0)
    assert next_token(np.array([1.0, 1.5]), sampling, np.array([0]), rng) == 1
    assert next_token(np.array([1.0, 1.5]), sampling, np.array([1]), rng) == 0


def test_a_nucleus_by_hand() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    for top_p, size in ((0.1, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (0.9, 4), (1.0, 4)):
        assert nucleus_size(p, top_p) == size


def test_min_p_by_hand() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    for min_p, size in ((0.0, 4), (0.25, 4), (0.3, 2), (0.5, 2), (0.6, 1), (1.0, 1)):
        assert min_p_size(p, min_p) == size
    assert min_p_size(np.array([0.25] * 4), 1.0) == 4  # as probable as the first


def test_the_steps_by_hand() -> None:
    # Halving the largest by its penalty leaves log 4, log 4, log 2, log 1, and temperature 1/2 squares.
    logits = np.log([16.0, 4.0, 2.0, 1.0])
    given = {"temperature": 0.5, "repetition_penalty": 2.0}
    assert drawn_from(logits, Sampling(**given), [0]) == pytest.approx(
        {0: 16 / 37, 1: 16 / 37, 2: 4 / 37, 3: 1 / 37}
    )
    # Three are left, of 36; the nucleus of 33/36 takes all three, min-p of 1/2 two.
    assert drawn_from(logits, Sampling(top_k=3, **given), [0]) == pytest.approx(
        {0: 16 / 36, 1: 16 / 36, 2: 4 / 36}
    )
    left = Sampling(top_k=3, top_p=33 / 36, min_p=0.5, **given)
    assert drawn_from(logits, left, [0]) == pytest.approx({0: 0.5, 1: 0.5})


@given(
    V=st.integers(1, 12),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 9.0, 1e300]),
        top_k=st.none() | st.integers(1, 14),
        top_p=st.none() | st.floats(1e-9, 1.0),
        min_p=st.none() | st.floats(0.0, 1.0),
        repetition_penalty=st.sampled_from([1e-30, 0.5, 1.0, 1.3, 1e30]),
    ),
    spread=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
    seed=SEEDS,
)
@quick(300)
def test_something_can_always_be_drawn(V: int, sampling: Sampling, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers of few values: many are equal.
    logits = (spread * rng.integers(-2, 3, V)).astype(np.float32)
    seen = rng.integers(0, V + 2, rng.integers(0, 5))
    found = drawn_from(logits, sampling, seen)
    assert sum(found.values()) == pytest.approx(1.0)
    assert all(p >= 0 for p in found.values())
    assert 1 <= len(found) <= (sampling.top_k or V)
    # The most probable come first, equal ones by their ids, and none that is left out comes before.
    after = penalised(logits, seen, sampling.repetition_penalty)
    assert list(found) == np.argsort(-after, kind="stable")[: len(found)].tolist()


# ---- transformers' own ---------------------------------------------------------------------------


@given(
    V=st.integers(2, 40),
    temperature=st.sampled_from([0.4, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 0.99),
    min_p=st.none() | st.floats(0.01, 0.9),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    seed=SEEDS,
)
@quick(60)
def test_the_probabilities_are_those_of_transformers(
    V: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    seed: int,
) -> None:
    import torch
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(0, 3, V), rng.integers(0, V, 6)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=top_p or 1.0,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    mixin = GenerationMixin()
    mixin.config = SimpleNamespace(is_encoder_decoder=False)
    steps = mixin._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    expected = steps(torch.tensor(seen[None]), torch.tensor(logits[None])).softmax(-1)[0].numpy()
    found = drawn_from(logits, Sampling(temperature, top_k, top_p, min_p, penalty), seen)
    assert set(found) == set(np.flatnonzero(expected).tolist())
    assert found == pytest.approx({token: expected[token] for token in found}, rel=1e-9)
