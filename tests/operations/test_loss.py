"""The output head and the negative log-likelihood of the targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from mhmoe_np.operations.table import Operations
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    FAST,
    LENGTHS,
    NUMPY,
    SEEDS,
    TINY,
    WIDTHS,
    Inputs,
    agree,
    always,
    is_the_derivative,
    near,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    of_the_device,
    quick,
    unchanged,
)


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


# Around the 64 rows of a task, the 512 of a product and the strips of 512 of the vocabulary.
VOCABULARIES = [{"N": N, "V": V} for N in (63, 129, 513) for V in (511, 512, 513, 1025)]


@of_each_fast_backend
@of_each_dtype
@always([case | {"D": 5, "ignored": 0.2, "seed": 16} for case in VOCABULARIES])
@always([{"N": N, "V": 9, "D": 3, "ignored": 1.0, "seed": 17} for N in (1, 130)])
@given(N=LENGTHS, V=WIDTHS, D=WIDTHS, ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=SEEDS)
@quick(20)
def test_token_nll_agrees(
    dtype: Any, name: str, N: int, V: int, D: int, ignored: float, seed: int
) -> None:
    token_nll_agrees(FAST[name], dtype, N, V, D, ignored, seed)


# Numba's chunk of logits has 256 rows where 32 MiB hold fewer, 1024 where they hold more.
@of_each_dtype
@pytest.mark.parametrize(("N", "V"), [(256, 40_000), (257, 40_000), (1024, 7), (1025, 7)])
def test_token_nll_agrees_around_a_chunk_of_numbas(dtype: Any, N: int, V: int) -> None:
    token_nll_agrees(FAST["numba"], dtype, N, V, 5, 0.2, 16)


@of_the_device
@pytest.mark.parametrize("name", [param for param in FAST if param != "numba"])
@of_each_dtype
@pytest.mark.parametrize("N", [255, 256, 257, 513])
def test_token_nll_agrees_around_a_chunk_on_the_gpu(
    name: str, dtype: Any, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mhmoe_np.operations.cuda import loss

    V = 37  # 256 rows a chunk
    monkeypatch.setattr(loss, "CHUNK_BYTES", 300 * V * np.dtype(dtype).itemsize)
    token_nll_agrees(FAST[name], dtype, N, V, 5, 0.2, 18)


def token_nll_agrees(
    ops: Operations, dtype: Any, N: int, V: int, D: int, ignored: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    x, w, target = r(N, D), r(V, D), r.rng.integers(0, V, N)
    target[r.rng.random(N) < ignored] = -100
    expected = r(V, D)
    actual, before = expected.copy(), expected.copy()
    with unchanged(x, w, target):
        nll = NUMPY.token_nll(x, w, target)
        actual_nll = ops.token_nll(x, w, target)
        both = NUMPY.token_nll_and_gradient(x, w, target, expected, dnll=0.3)
        actual_both = ops.token_nll_and_gradient(x, w, target, actual, dnll=0.3)
    nll_size, dx_size, dw_size = sizes(x, w, target, before, dnll=0.3)
    agree(actual_nll, nll, nll_size)
    agree([*actual_both, actual], [*both, expected], nll_size, dx_size, dw_size)
    agree(actual_both[0], nll, nll_size)
    assert (actual_both[0][target < 0] == 0).all()
    assert (actual_both[1][target < 0] == 0).all()


def sizes(x: Any, w: Any, target: Any, before: Any, *, dnll: float) -> tuple[Any, Any, Any]:
    """What is added up in nll, a difference of logits, in dx and in dw.

    A logit is off in proportion to Z = sum_d |x w|, and its probability by as much; the sum of V
    exponentials, all positive, by up to sqrt(V)/8. In dw one token may outweigh all N others.
    """
    counted = (target >= 0)[:, None]
    z = 1 + len(w) ** 0.5 / 8 + (np.abs(x) @ np.abs(w).T).max(axis=1, keepdims=True)
    logits = (x @ w.T).astype(float)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    dlogits = p / p.sum(axis=1, keepdims=True) * z
    dlogits[np.arange(len(target)), np.maximum(target, 0)] += 1
    dlogits *= dnll * counted
    dw = (dlogits.T @ np.abs(x) + np.abs(before)) * (1 + len(x) ** 0.5 / 8)
    return z[:, 0] * counted[:, 0], dlogits @ np.abs(w), dw


@of_each_backend
def test_token_nll_and_gradient_returns_the_derivative(name: str) -> None:
    is_the_derivative(operation_checks.token_nll(BACKENDS[name], np.random.default_rng(28)))


@of_each_backend
@pytest.mark.parametrize("dnll", [1.0, 0.37])
def test_the_gradient_is_proportional_to_that_of_each_nll(name: str, dnll: float) -> None:
    r, ops = Inputs(28, float), BACKENDS[name]
    x, w, target = r(8, 4), r(11, 4), r.rng.integers(0, 11, 8)
    target[[1, 5]] = -100
    once, times = np.zeros((11, 4)), np.zeros((11, 4))
    nll, dx = ops.token_nll_and_gradient(x, w, target, once, dnll=1.0)
    again, scaled = ops.token_nll_and_gradient(x, w, target, times, dnll=dnll)
    np.testing.assert_array_equal(again, nll)
    near(scaled, dnll * dx)
    near(times, dnll * once)
