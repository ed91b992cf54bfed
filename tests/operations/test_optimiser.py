"""AdamW, and the norm that clipping needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.table import AdamWSettings
from tests.operations import dumb
from tests.operations.cases import (
    ADAMW,
    BACKENDS,
    CUDA,
    FAST,
    NUMPY,
    SEEDS,
    Inputs,
    agree,
    always,
    copies,
    near,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    of_the_device,
    quick,
    same_bits,
    unchanged,
)

FLAT = [1, 32767, 32768, 32769, 65535, 65536, 65537]


@given(step=st.integers(1, 2000), squares=st.sampled_from([0.5, 100.0]), seed=SEEDS)
@quick(30)
def test_adamw_updates_every_parameter_by_the_formula(step: int, squares: float, seed: int) -> None:
    # [AdamW algorithm 2], [spec 6 AdamW], [spec 6 clip]
    r = Inputs(seed, float)
    state = [r(5), r(5), r(5), r(5) ** 2]
    expected = [
        dumb.adamw(*numbers, squares, step, *ADAMW)
        for numbers in zip(*(array.tolist() for array in state), strict=True)
    ]
    NUMPY.adamw_in_place(*state, np.array([squares]), np.zeros(2), np.zeros(1), ADAMW.update(step))
    parameter, gradient, first, second = state
    near(np.stack([parameter, first, second], axis=1), expected)
    assert not gradient.any()


@of_each_backend
@of_each_dtype
@always([{"P": P, "start": 1.5, "seed": 18} for P in FLAT])
@given(P=st.integers(1, 300), start=st.sampled_from([0.0, 7.0]), seed=SEEDS)
@quick(10)
def test_squares_are_summed_in_float64_onto_the_total(
    name: str, dtype: Any, P: int, start: float, seed: int
) -> None:
    x, total = Inputs(seed, dtype)(P), np.array([start])
    with unchanged(x):
        BACKENDS[name].add_sum_of_squares(x, total)
    exact = math.fsum([start, *(value * value for value in x.tolist())])
    # Positive terms of float64 whatever the input: a rounding each, and of each sum, at the very most.
    assert total[0] == pytest.approx(exact, rel=2 * P * 2.0**-53, abs=0)


@of_each_fast_backend
@of_each_dtype
@always([{"P": P, "step": 2, "squares": 4.0, "decay": 0.1, "seed": 19} for P in FLAT])
@given(
    P=st.integers(1, 300),
    step=st.sampled_from([1, 2, 1000]),
    squares=st.sampled_from([0.5, 1e4]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=SEEDS,
)
@quick(20)
def test_adamw_agrees(
    name: str, dtype: Any, P: int, step: int, squares: float, decay: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    expected = [r(P), r(P), r(P), r(P) ** 2]
    expected[3][::3] = 0  # as at the first step
    actual, (p, _, first, _) = copies(expected), copies(expected)
    total, guard = np.array([squares]), np.array([[squares, 1.0]])
    settings = ADAMW._replace(weight_decay=decay)
    with unchanged(total, guard):
        for ops, state in ((NUMPY, expected), (FAST[name], actual)):
            ops.adamw_in_place(*state, total, guard, np.zeros(1), settings.update(step))
    # The first moment is a sum that may cancel, and what is taken from the parameter is made of it.
    first_size = np.abs(first) + np.abs(expected[2])
    root = np.sqrt(expected[3] / (1 - ADAMW.beta2**step)) + ADAMW.epsilon
    move = first_size / (1 - ADAMW.beta1**step) / root
    agree(actual, expected, np.abs(p) + ADAMW.learning_rate * move, 0, first_size)
    assert not actual[1].any()


@of_each_backend
@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
def test_the_first_float32_second_moment_is_its_share_of_the_square(name: str, beta2: float) -> None:
    r = Inputs(59, np.float32)
    gradient = r(100)
    state = [r(100), gradient.copy(), r(100) * 0, r(100) * 0]
    settings = AdamWSettings(1e-3, 0.9, beta2, 1e-8, 0.0, clip_norm=1.0)
    BACKENDS[name].adamw_in_place(*state, np.ones(1), np.ones(1), np.zeros(1), settings.update(1))
    # The factor, the square and the product are rounded once each: half an eps, thrice.
    exact = (1 - beta2) * gradient.astype(float) ** 2
    np.testing.assert_allclose(state[3], exact, rtol=2 * np.finfo(np.float32).eps)


@of_each_backend
@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (8.0, 0.125)])
def test_a_gradient_beyond_the_clip_norm_is_shortened_to_it(
    name: str, norm: float, factor: float
) -> None:
    r, ops = Inputs(60, float), BACKENDS[name]
    start = [r(9), r(9), r(9), r(9) ** 2]
    clipped, shortened = copies(start), copies(start)
    shortened[1] *= factor
    loose = ADAMW._replace(clip_norm=1e9)
    ops.adamw_in_place(*clipped, np.array([norm**2]), np.zeros(1), np.zeros(1), ADAMW.update(2))
    ops.adamw_in_place(*shortened, np.ones(1), np.zeros(1), np.zeros(1), loose.update(2))
    for a, b in zip(clipped, shortened, strict=True):
        np.testing.assert_array_equal(a, b)


@of_each_backend
@of_each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_nothing_changes_where_the_guard_holds_a_number_that_is_not_finite(
    name: str, dtype: Any, bad: float, place: int
) -> None:
    r = Inputs(61, dtype)
    state, guard = [r(9), r(9), r(9), r(9) ** 2], np.ones((2, 3))
    guard.ravel()[place] = bad
    left_out = np.zeros(1)
    with unchanged(*state, guard, left_out):
        BACKENDS[name].adamw_in_place(*state, np.ones(1), guard, left_out, ADAMW.update(1))


@of_each_backend
@of_each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoilt", [0, 1, 2, 3])
def test_an_element_whose_update_is_not_finite_stays_as_it_is(
    name: str, dtype: Any, bad: float, spoilt: int
) -> None:
    r, P, places = Inputs(62, dtype), 32768 + 9, [3, 32768 + 5]
    state = [r(P), r(P), r(P), r(P) ** 2]
    expected, left_out = copies(state), np.zeros(1)
    BACKENDS[name].adamw_in_place(*expected, np.ones(1), np.zeros(1), left_out, ADAMW.update(1))
    assert left_out[0] == 0
    state[spoilt][places] = bad
    before = copies(state)
    with np.errstate(all="ignore"):
        BACKENDS[name].adamw_in_place(*state, np.ones(1), np.zeros(1), left_out, ADAMW.update(1))
    assert left_out[0] == 2
    others = np.setdiff1d(np.arange(P), places)
    for was, is_now, wanted in zip(before, state, expected, strict=True):
        np.testing.assert_array_equal(is_now[places], was[places])
        np.testing.assert_array_equal(is_now[others], wanted[others])


@of_each_backend
def test_an_update_that_overflows_is_left_out(name: str) -> None:
    state = [np.full(9, value, np.float32) for value in (1.0, 1.0, 0.0, 0.0)]
    before, left_out = copies(state), np.zeros(1)
    mad = ADAMW._replace(learning_rate=1e39)
    with np.errstate(all="ignore"):
        BACKENDS[name].adamw_in_place(*state, np.ones(1), np.ones(1), left_out, mad.update(1))
    assert left_out[0] == 9
    for was, is_now in zip(before, state, strict=True):
        np.testing.assert_array_equal(is_now, was)


# ---- the GPU: the definition's own roundings -------------------------------------------------


@of_the_device
@of_each_dtype
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("squares", [0.0, 0.5, 1e4])
def test_the_gpu_rounds_as_the_definition_does(dtype: Any, step: int, squares: float) -> None:
    r, P = Inputs(68, dtype), 2500
    expected = [r(P), r(P), r(P), r(P) ** 2]
    expected[3][::3] = 0
    actual = copies(expected)
    for ops, state in ((NUMPY, expected), (CUDA, actual)):
        ops.adamw_in_place(*state, np.array([squares]), np.ones(1), np.zeros(1), ADAMW.update(step))
    same_bits(actual, expected)


@of_the_device
def test_a_guard_of_many_numbers_is_read_to_its_end() -> None:
    r, guard = Inputs(69, float), np.ones(1000)
    for place in (0, 255, 256, 999):
        state, left_out = [r(9), r(9), r(9), r(9) ** 2], np.zeros(1)
        guard[...], guard[place] = 1, math.nan
        with unchanged(*state, left_out):
            CUDA.adamw_in_place(*state, np.ones(1), guard, left_out, ADAMW.update(1))


@of_the_device
def test_the_sum_of_squares_has_one_order() -> None:
    x, totals = Inputs(70, np.float32)(20000), np.zeros((3, 1))
    for total in totals:  # emulated, each with its threads in another order
        CUDA.add_sum_of_squares(x, total)
    assert totals[0] == totals[1] == totals[2]
