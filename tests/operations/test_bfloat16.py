"""Weights in bfloat16: what they round to, and products with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.bfloat16 import from_bfloat16, to_bfloat16
from tests.operations.cases import DTYPES, NUMBA, NUMPY, SEEDS, Inputs, agree, always, quick


def test_weights_round_to_the_upper_half_of_their_bits_halves_to_even() -> None:
    # [spec 5 output head]
    half = 2.0**-8  # of the step between neighbours from 1 on
    w = np.array([[1, 1 + half, 1 + 3 * half, -1 - 1.01 * half, 0, -0.0]], np.float32)
    expected = [[1, 1, 1 + 4 * half, -1 - 2 * half, 0, -0.0]]
    found = from_bfloat16(to_bfloat16(w))
    assert found.tobytes() == np.array(expected, np.float32).tobytes()


def case(rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    return {"rows": rows, "outputs": outputs, "inputs": inputs, "seed": 3}


@pytest.mark.skipif(NUMBA is None, reason="of the numba backend")
@pytest.mark.parametrize("dtype", DTYPES)
@always([case(1, 1, 1), case(3, 257, 33), case(2, 2000, 300)])
@given(rows=st.integers(1, 9), outputs=st.integers(1, 300), inputs=st.integers(1, 90), seed=SEEDS)
@quick(10)
def test_a_linear_map_is_that_of_the_rounded_weights(
    dtype: Any, rows: int, outputs: int, inputs: int, seed: int
) -> None:
    # [spec 5 output head]
    r = Inputs(seed, dtype)
    weight, x, b = to_bfloat16(r(outputs, inputs).astype(np.float32)), r(rows, inputs), r(outputs)
    floats = from_bfloat16(weight).astype(dtype)
    expected, size = x @ floats.T + b, np.abs(x) @ np.abs(floats).T + np.abs(b)
    agree(NUMPY.linear(x, weight, b), expected, size)
    agree(NUMBA.linear(x, weight, b), expected, size)


def test_bfloat16_weights_have_no_backward() -> None:
    r = Inputs(18, np.float32)
    w = to_bfloat16(r(4, 6))
    for ops in filter(None, (NUMPY, NUMBA)):
        with pytest.raises(TypeError, match="packed"):
            ops.linear_backward(r(3, 4), r(3, 6), w, r(4, 6), None)
