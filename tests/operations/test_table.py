"""The whole table: two backends and one result, the same bits every time."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations.load import load_operations
from tests.operations.cases import (
    BACKENDS,
    NUMBA,
    NUMPY,
    bound,
    of_each_backend,
    of_each_dtype,
    same_bits,
)
from tests.operations.runs import TABLE, V, run_table


@of_each_dtype
def test_one_run_of_the_whole_table_agrees(dtype: Any) -> None:
    expected, actual = run_table(NUMPY, dtype, seed=1), run_table(NUMBA, dtype, seed=1)
    assert set(expected) == set(actual) == TABLE
    for name in expected:
        for a, e in zip(actual[name], expected[name], strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype), name
            if e.dtype.kind != "f":
                np.testing.assert_array_equal(a, e, err_msg=name)
                continue
            # Each run feeds results on (rstd, gates): their errors pass through sums of up to V.
            # How far single entries may be off is said operation by operation, in its own file.
            size = max(V**0.5, float(np.abs(e).max()))
            np.testing.assert_allclose(a, e, rtol=0, atol=bound(dtype) * size, err_msg=name)


@of_each_backend
@of_each_dtype
def test_the_same_input_gives_the_same_bits_again(name: str, dtype: Any) -> None:
    ops = BACKENDS[name]
    first, second = run_table(ops, dtype, seed=51), run_table(ops, dtype, seed=51)
    assert set(first) == TABLE
    for operation in first:
        same_bits(second[operation], first[operation])


@of_each_dtype
def test_kept_buffers_change_no_value(dtype: Any) -> None:
    keeping = load_operations("numba", keep_buffers=True)
    expected = run_table(NUMBA, dtype, seed=52)
    for _ in range(2):  # the second time on memory that holds the first one's results
        with keeping.scope():
            actual = run_table(keeping, dtype, seed=52)
            for name in expected:
                same_bits(actual[name], expected[name])
