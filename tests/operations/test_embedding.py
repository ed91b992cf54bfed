"""The embedding: what its gradient's order promises. (The definition's tests: test_linear.py.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.cases import (
    CUDA,
    FAST,
    LENGTHS,
    NUMPY,
    SEEDS,
    Inputs,
    always,
    of_each_dtype,
    of_each_fast_backend,
    of_the_device,
    quick,
    same_bits,
    unchanged,
)


@of_each_fast_backend
@of_each_dtype
@always([{"N": 300, "V": V, "D": D, "seed": 71} for V, D in ((1, 65), (2, 64), (40, 63), (2000, 1))])
@given(N=LENGTHS, V=st.integers(1, 60), D=st.integers(1, 140), seed=SEEDS)
@quick(15)
def test_rows_are_added_in_their_order(
    name: str, dtype: Any, N: int, V: int, D: int, seed: int
) -> None:
    # Numbers of very different sizes: another order would have other bits.
    r, ops = Inputs(seed, dtype), FAST[name]
    ids = np.minimum(r.rng.integers(0, V, N), r.rng.integers(0, V, N))  # some often, some never
    w, dx, expected = r(V, D), r(N, D) * np.exp(r(N, 1, spread=5.0)), r(V, D)
    actual = expected.copy()
    with unchanged(ids, w, dx):
        same_bits(ops.embedding(ids, w), NUMPY.embedding(ids, w))
        NUMPY.embedding_backward(dx, ids, expected)
        ops.embedding_backward(dx, ids, actual)
    same_bits(actual, expected)


@of_the_device
def test_a_vocabulary_is_sorted_in_long_segments() -> None:
    r, N, V = Inputs(74, np.float32), 2100, 5000
    ids, dx, expected = r.rng.integers(0, V, N), r(N, 3), r(V, 3)
    ids[::5] = 4999  # in every segment
    actual = expected.copy()
    NUMPY.embedding_backward(dx, ids, expected)
    CUDA.embedding_backward(dx, ids, actual)
    same_bits(actual, expected)


@of_the_device
@pytest.mark.parametrize("N", [1, 31, 32, 33, 40, 65, 600])
def test_an_id_may_have_all_rows(N: int) -> None:
    r = Inputs(72, np.float32)
    ids, dx, expected = np.full(N, 3), r(N, 9), r(5, 9)
    expected[3, 0] = dx[:, 0] = -0.0  # to which nothing else is added: it stays as it is
    actual = expected.copy()
    NUMPY.embedding_backward(dx, ids, expected)
    CUDA.embedding_backward(dx, ids, actual)
    same_bits(actual, expected)


@of_the_device
def test_no_rows_change_nothing() -> None:
    dw, none = Inputs(73, float)(4, 3), np.zeros(0, np.int64)
    with unchanged(dw):
        CUDA.embedding_backward(np.zeros((0, 3)), none, dw)
    assert CUDA.embedding(none, dw).shape == (0, 3)
