"""RMSNorm, alone and of a sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    EDGES,
    EPS,
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
    quick,
    same_bits,
    unchanged,
)

# ---- the definition --------------------------------------------------------------------------


@given(N=TINY, D=TINY, spread=st.sampled_from([1.0, 1e-3, 0.0]), seed=SEEDS)
@quick(40)
def test_a_norm_divides_each_row_by_its_root_mean_square(
    N: int, D: int, spread: float, seed: int
) -> None:
    # [RMSNorm eq. 4], [spec 2 RMSNorm]
    r = Inputs(seed, float)
    x, w = r(N, D, spread=spread), r(D)
    y, rstd = NUMPY.rms_norm(x, w, eps=EPS)
    expected_y, expected_rstd = dumb.rms_norm(x, w, EPS)
    near(y, expected_y)
    near(rstd, expected_rstd)


# ---- one backend and the other ---------------------------------------------------------------


def backward_sizes(dy: Any, x: Any, w: Any, rstd: Any, dw: Any) -> tuple[Any, Any]:
    """What is added up in dx = r (dn - n mean(dn n)), which cancels wholly for D = 1, and in dw."""
    n, dn = np.abs(x) * rstd[:, None], np.abs(dy * w)
    dx = rstd[:, None] * (dn + n * (dn * n).mean(axis=1, keepdims=True))
    return dx, (np.abs(dy) * n).sum(axis=0) + np.abs(dw)


@of_each_fast_backend
@of_each_dtype
@always([{"N": N, "D": 13, "spread": 1.0, "seed": 5} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, spread=st.sampled_from([1.0, 1e-3, 0.0]), seed=SEEDS)
@quick(20)
def test_rms_norm_agrees(dtype: Any, name: str, N: int, D: int, spread: float, seed: int) -> None:
    r, ops = Inputs(seed, dtype), FAST[name]
    x, w, dy, expected = r(N, D, spread=spread), r(D), r(N, D), r(D)
    actual = expected.copy()
    y, rstd = NUMPY.rms_norm(x, w, eps=EPS)
    sizes = backward_sizes(dy, x, w, rstd, expected)
    with unchanged(x, w, dy, rstd):
        agree(ops.rms_norm(x, w, eps=EPS), (y, rstd))
        dx = NUMPY.rms_norm_backward(dy, x, w, rstd, expected)
        actual_dx = ops.rms_norm_backward(dy, x, w, rstd, actual)
    agree([actual_dx, actual], [dx, expected], *sizes)


@of_each_backend
@of_each_dtype
@always([{"N": N, "D": 13, "seed": 6} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_a_gradient_can_be_added_to_another(dtype: Any, name: str, N: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), BACKENDS[name]
    x, w, dy, around, dw = r(N, D), r(D), r(N, D), r(N, D), r(D)
    _, rstd = ops.rms_norm(x, w, eps=EPS)
    size, _ = backward_sizes(dy, x, w, rstd, dw)
    with unchanged(x, w, dy):
        dx, onto = ops.rms_norm_backward(dy, x, w, rstd, dw), around.copy()
        assert ops.rms_norm_backward(dy, x, w, rstd, dw, onto_ND=onto) is onto
    agree(onto, around + dx, size + np.abs(around))


@of_each_backend
@of_each_dtype
@always([{"N": N, "D": 13, "seed": 7} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_a_sum_is_normed_as_if_added_before(dtype: Any, name: str, N: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), BACKENDS[name]
    x, branch, w = r(N, D), r(N, D), r(D)
    total = x + branch
    with unchanged(x, w):
        found = ops.add_in_place_and_norm(x, branch, w, eps=EPS)
    np.testing.assert_array_equal(branch, total)
    same_bits(found, ops.rms_norm(total, w, eps=EPS))


# ---- gradients -------------------------------------------------------------------------------


@of_each_backend
def test_rms_norm_backward_is_the_derivative(name: str) -> None:
    is_the_derivative(operation_checks.rms_norm(BACKENDS[name], np.random.default_rng(22), rows=70))
