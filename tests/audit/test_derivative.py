"""Derivatives by differences are those of calculus, and a wrong gradient is named to the entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit.derivative import GradientCheck, check_gradients, derivative, relative_error

AGREEMENT = 1e-9


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda t: 3 * t, 3.0),
        (math.sin, 1.0),
        (lambda t: math.exp(50 * t), 50.0),
        # Curved on a scale of 1e-4: the first steps are far too long.
        (lambda t: math.atan(1e4 * t), 1e4),
        # A kink in the slope, and another function, each closer than the first steps reach.
        (lambda t: 2 * t + max(t - 3e-4, 0.0) ** 2, 2.0),
        (lambda t: math.cos(1 + t) if abs(t) < 1e-4 else math.nan, -math.sin(1)),
        (lambda t: math.cos(1 + t) if t < 1e-4 else math.nan, -math.sin(1)),
    ],
)
def test_a_derivative_is_that_of_calculus(f: Callable[[float], float], expected: float) -> None:
    assert derivative(f, rounding=0, agreement=AGREEMENT) == pytest.approx(expected, rel=1e-8)


def test_where_there_is_no_value_there_is_no_derivative_to_agree_with() -> None:
    numeric = derivative(lambda t: math.nan, rounding=1e-16, agreement=AGREEMENT)
    assert relative_error(numeric, 0.3) == 1


@given(st.floats(1e-6, 1), st.floats(1, 10))
def test_short_steps_that_agree_by_rounding_alone_are_not_taken(slope: float, size: float) -> None:
    rounding = math.ulp(size + 1)
    numeric = derivative(
        lambda t: size + slope * math.sin(t) - size, rounding=rounding, agreement=AGREEMENT
    )
    # The first stencil's steps are 1e-3 and 2e-3, the second's half of that.
    assert abs(numeric - slope) <= 4 * rounding / 1e-3 + 1e-10 * slope


def test_a_stencil_is_not_taken_twice() -> None:
    asked: list[float] = []

    def linear(t: float) -> float:
        asked.append(t)
        return 3 * t

    derivative(linear, rounding=0, agreement=AGREEMENT)
    assert len(asked) == len(set(asked)) == 6


def test_relative_errors() -> None:
    assert relative_error(2.0, 2.0) == relative_error(0.0, 0.0) == 0
    assert relative_error(1.0, 2.0) == relative_error(2.0, 1.0) == 0.5
    assert relative_error(1e-30, -1e-30) == 2
    for bad in (math.nan, math.inf, -math.inf):
        assert relative_error(bad, 1.0) == relative_error(1.0, bad) == math.inf


X, Y = np.arange(6.0).reshape(2, 3) - 2.2, np.array([0.5, -1.5])


def check(gradients: dict[str, Any]) -> GradientCheck:
    """Of sum(x^3) + sum(x) sum(y^2)."""

    def value(argument: str, moved: Any) -> float:
        now = {"x": X, "y": Y, argument: moved}
        return float((now["x"] ** 3).sum() + now["x"].sum() * (now["y"] ** 2).sum())

    rng = np.random.default_rng(0)
    return check_gradients(
        "two",
        value,
        {"x": X, "y": Y},
        gradients,
        rounding=1e-15,
        directions=3,
        bound=1e-7,
        rng=rng,
    )


def right() -> dict[str, Any]:
    return {"x": 3 * X**2 + (Y**2).sum(), "y": 2 * Y * X.sum()}


def test_right_gradients_pass() -> None:
    found = check(right())
    assert found.passed
    assert found.max_rel_error < 1e-9
    assert found.entry is None
    assert found.as_dict()["entry"] is None


@pytest.mark.parametrize(
    ("argument", "place", "off"), [("x", (1, 2), 1e-4), ("x", (0, 0), -1e-4), ("y", (1,), 3.0)]
)
def test_a_wrong_entry_is_named_with_both_numbers(
    argument: str, place: tuple[int, ...], off: float
) -> None:
    gradients = right()
    true = gradients[argument][place]
    gradients[argument][place] += off
    found = check(gradients)
    assert not found.passed
    assert (found.argument, found.entry and found.entry.place) == (argument, place)
    assert found.entry is not None
    assert found.entry.numeric == pytest.approx(true, rel=1e-9)
    assert found.entry.analytic == true + off
    assert found.as_dict()["entry"] == {
        "place": place,
        "numeric": found.entry.numeric,
        "analytic": true + off,
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_a_number_fails(bad: float) -> None:
    gradients = right()
    gradients["x"][1, 0] = bad
    found = check(gradients)
    assert not found.passed
    assert (found.argument, found.max_rel_error) == ("x", math.inf)
    assert found.entry is not None
    assert found.entry.place == (1, 0)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two: the gradient of y is \(2, 1\), not \(2,\)"):
        check({"y": Y[:, None]})
