"""The exact head: its bound holds, and its tokens are those of the float32 head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.model.head import ExactHead, growth, int8_head
from mhmoe_np.operations.int8 import from_int8, quantise_blocks
from mhmoe_np.operations.load import load_operations
from tests.operations.cases import NUMBA, NUMPY, SEEDS, quick

BACKENDS = {"numpy": NUMPY} | ({"numba": NUMBA} if NUMBA else {})
of_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def bound_of(head: ExactHead, x_D: Any) -> Any:
    """Of all tokens."""
    return head.bound(x_D).of(np.arange(head.weight.outputs))


def numbers(rng: np.random.Generator, *shape: int, kind: str) -> Any:
    """Numbers of different spreads: even ones, some large ones among small ones, halves of a step."""
    x = rng.standard_normal(shape)
    if kind == "outliers":
        x *= np.where(rng.random(shape) < 0.02, 1e3, 1)
    elif kind == "halves":  # everything as far from the integers of its block as can be
        x = rng.integers(-126, 126, shape) + 0.499
        x[..., ::32] = 127
    elif kind == "zeros":
        x *= rng.random(shape) < 0.1
    return x.astype(np.float32)


@given(
    kinds=st.tuples(*[st.sampled_from(["even", "outliers", "halves", "zeros"])] * 2),
    width=st.integers(1, 130),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=SEEDS,
)
@quick(40)
def test_no_score_is_further_from_its_logit_than_the_bound(
    kinds: tuple[str, str], width: int, spread: float, seed: int
) -> None:
    # [spec 5 8-bit weights], [Higham section 3.1]
    rng = np.random.default_rng(seed)
    w_VD, x_1D = numbers(rng, 40, width, kind=kinds[0]), numbers(rng, 1, width, kind=kinds[1])
    x_1D *= np.float32(spread)
    head = ExactHead(w_VD, ops=NUMPY)
    score_V = NUMPY.linear(x_1D, head.weight, None)[0].astype(np.float64)
    bound_V = bound_of(head, x_1D[0])
    for logit_V in (NUMPY.linear(x_1D, w_VD, None)[0], w_VD.astype(np.float64) @ x_1D[0]):
        assert (np.abs(score_V - logit_V) <= bound_V).all()


def test_the_bound_is_reached_within_a_few_times() -> None:
    """Errors of one sign everywhere: a bound half as large would be wrong somewhere."""
    step = np.full((1, 64), 0.499, np.float32)
    step[0, ::32] = 127
    head = ExactHead(step, ops=NUMPY)
    x_1D = np.full((1, 64), 1, np.float32)  # integers themselves, so that the weights alone err
    error = abs(NUMPY.linear(x_1D, head.weight, None)[0, 0] - float(step.sum()))
    assert 0.4 * bound_of(head, x_1D[0])[0] < error <= bound_of(head, x_1D[0])[0]


def adversarial(rng: np.random.Generator, V: int, D: int, case: str) -> tuple[Any, Any]:
    """A head and a row whose largest logits tie, or nearly."""
    w_VD = rng.standard_normal((V, D)).astype(np.float32)
    x_1D = rng.standard_normal((1, D)).astype(np.float32)
    best = np.argsort(-(w_VD @ x_1D[0]))[:5]
    if case == "ties":
        w_VD[rng.permutation(V)[:7]] = w_VD[best[0]]
    elif case == "near ties":
        for token in rng.permutation(V)[:7]:
            w_VD[token] = w_VD[best[0]]
            w_VD[token, rng.integers(D)] *= np.float32(1 + 2**-22)
    elif case == "all equal":
        w_VD[:] = w_VD[0]
    elif case == "zeros":
        x_1D[:] = 0
    return w_VD, x_1D


@of_each_backend
@pytest.mark.parametrize("case", ["random", "ties", "near ties", "all equal", "zeros"])
def test_the_most_probable_token_is_the_float32_heads(backend: str, case: str) -> None:
    ops = BACKENDS[backend]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        w_VD, x_1D = adversarial(rng, 203 + seed, 40 + seed, case)
        head = ExactHead(w_VD, ops=ops)
        score_V = ops.linear(x_1D, head.weight, None)[0]
        expected = ops.linear(x_1D, w_VD, None)[0]
        found = head.logits(x_1D, 0, score_V, 1)
        assert np.argmax(found) == np.argmax(expected)
        known = 150  # tokens that can be drawn
        found = head.logits(x_1D, 0, score_V[:known], 1)
        assert found.shape == (known,)
        assert np.argmax(found) == np.argmax(expected[:known])


@pytest.mark.skipif(NUMBA is None, reason="of the numba backend")
@pytest.mark.parametrize("case", ["random", "ties", "near ties"])
def test_the_k_most_probable_tokens_and_their_logits_are_the_float32_heads(case: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        w_VD, x_1D = adversarial(rng, 600 + seed, 64 + seed, case)
        head = ExactHead(w_VD, ops=NUMBA)
        found = head.logits(x_1D, 0, NUMBA.linear(x_1D, head.weight, None)[0], 20)
        expected = NUMBA.linear(x_1D, w_VD, None)[0]
        best = np.argsort(-expected, kind="stable")[:20]
        assert np.argsort(-found, kind="stable")[:20].tolist() == best.tolist()
        assert found[best].tobytes() == expected[best].tobytes()


def test_few_tokens_are_looked_at() -> None:
    rng = np.random.default_rng(1)
    w_VD = rng.standard_normal((4000, 256)).astype(np.float32)
    x_1D = rng.standard_normal((1, 256)).astype(np.float32)
    head = ExactHead(w_VD, ops=NUMPY)
    score_V = NUMPY.linear(x_1D, head.weight, None)[0]
    for count, most in ((1, 100), (20, 400)):
        found = head.logits(x_1D, 0, score_V, count)
        assert count <= np.isfinite(found).sum() <= most


def test_a_head_beyond_the_scales_is_refused() -> None:
    with pytest.raises(UserError, match="--head-dtype float32"):
        int8_head(np.full((3, 5), 1e9, np.float32))


def test_the_norms_are_those_of_what_acts() -> None:
    rng = np.random.default_rng(2)
    w_VD = rng.standard_normal((5000, 9)).astype(np.float32)  # more panels than are taken at once
    head = ExactHead(w_VD, ops=load_operations("numpy"))
    x_D = w_VD[7]
    acting = from_int8(head.weight)[0].astype(float)
    q, scale = quantise_blocks(x_D[None])
    x_off = np.linalg.norm(x_D - (q[0, 0, :9].astype(float) * scale[0, 0]))
    x = np.linalg.norm(x_D.astype(float))
    size, off = np.linalg.norm(acting, axis=1), np.linalg.norm(w_VD - acting, axis=1)
    roundings = growth(3) * size * (x + x_off) + growth(9) * (size + off) * x
    np.testing.assert_allclose(bound_of(head, x_D), off * x + size * x_off + roundings, rtol=1e-6)
