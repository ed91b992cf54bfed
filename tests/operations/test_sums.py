"""Sums: of two arrays, and of an array's numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.cases import (
    BACKENDS,
    LENGTHS,
    NUMPY,
    SEEDS,
    TINY,
    WIDTHS,
    Inputs,
    of_each_backend,
    of_each_dtype,
    quick,
    unchanged,
)


@given(N=TINY, D=TINY, seed=SEEDS)
@quick(20)
def test_every_number_is_added_to_the_one_in_its_place(N: int, D: int, seed: int) -> None:
    r = Inputs(seed, float)
    x, onto = r(N, D), r(N, D)
    expected = [[onto[n, d] + x[n, d] for d in range(D)] for n in range(N)]
    NUMPY.add_in_place(x, onto)
    assert onto.tolist() == expected


@of_each_backend
@of_each_dtype
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_an_addition_rounds_once_and_leaves_the_summand(
    name: str, dtype: Any, N: int, D: int, seed: int
) -> None:
    r = Inputs(seed, dtype)
    x, onto = r(N, D), r(N, D, spread=100.0)
    expected = (x.astype(np.float64) + onto.astype(np.float64)).astype(dtype)
    with unchanged(x):
        BACKENDS[name].add_in_place(x, onto)
    np.testing.assert_array_equal(onto, expected)


@of_each_backend
@of_each_dtype
@given(N=st.one_of(LENGTHS, st.just(5000)), start=st.sampled_from([0.0, 3.5]), seed=SEEDS)
@quick(20)
def test_a_total_goes_on_in_float64(name: str, dtype: Any, N: int, start: float, seed: int) -> None:
    x = Inputs(seed, dtype)(N)
    total = np.array([start])
    with unchanged(x):
        BACKENDS[name].add_sum(x, total)
    exact = math.fsum([start, *x.tolist()])
    # At most N roundings of float64, whatever x is: a float32 sum would be off by far more.
    size = abs(start) + float(np.abs(x.astype(np.float64)).sum())
    assert abs(total[0] - exact) <= N * 2.0**-53 * size


@of_each_backend
def test_a_float32_total_keeps_what_float32_could_not(name: str) -> None:
    x, total = np.array([1, 2.0**-30, 2.0**-30], np.float32), np.zeros(1)
    BACKENDS[name].add_sum(x, total)
    assert total[0] == 1 + 2.0**-29
    BACKENDS[name].add_sum(x[1:], total)
    assert total[0] == 1 + 2.0**-28
