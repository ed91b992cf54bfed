"""Derivatives by differences, and gradients held against them.

For y = f(x), a random upstream gradient dy and a random direction v, <dx, v> must equal the derivative
of <dy, f(x + t v)> at t = 0. Ones are never used as dy: a softmax's rows sum to 1, so its gradient
under ones is 0 and hides errors. The derivative is taken by the fourth-order central stencil
(8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, with h halved until two in a row agree: a norm of small
numbers curves strongly, squared ReLU has kinks in its slope, and where the router's choice switches
there is no derivative at all. Shorter steps lose digits to f's rounding, and then two in a row agree by
accident: how far they agree counts only down to what that rounding makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.types import FloatArray

FIRST_STEP, LAST_STEP = 1e-3, 1e-7

Value = Callable[[str, FloatArray], float]
"""A function of several arrays of which one is moved: its name, and what it is now.

NaN where the function is another one than at the point, so that no derivative is taken across.
"""


class Entry(NamedTuple):
    """One entry of a gradient: by differences, and as the backward says."""

    place: tuple[int, ...]
    numeric: float
    analytic: float

    @property
    def distance(self) -> float:
        """Between the two; infinite where one is not a number."""
        distance = abs(self.numeric - self.analytic)
        return math.inf if math.isnan(distance) else distance


class GradientCheck(NamedTuple):
    """The worst relative error over all arguments and directions, and what it must stay below."""

    name: str
    max_rel_error: float
    bound: float
    argument: str  # whose gradient has that error
    entry: Entry | None  # of that gradient: where it is farthest off, if the check failed

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.max_rel_error <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """All fields, that of the entry as a dictionary."""
        return self._asdict() | {"entry": self.entry and self.entry._asdict()}


def derivative(f: Callable[[float], float], *, rounding: float, agreement: float) -> float:
    """df/dt at 0 by the fourth-order central stencil, on the two steps in a row that agree best.

    rounding: how far a value of f may be off; a difference over a step is off by that over the step.
    agreement: relative; the first two that agree so well are taken. The choice looks at f alone and
    never at the gradient under test.
    """

    def difference(step: float) -> float:
        return f(step) - f(-step)

    best, best_gap, previous = 0.0, math.inf, math.inf
    step, far = FIRST_STEP, difference(2 * FIRST_STEP)
    # Where the rounding alone is more than the best gap, no shorter step can be better.
    while step >= LAST_STEP and best_gap > max(agreement * abs(best), rounding / step):
        near = difference(step)
        value = (8 * near - far) / (12 * step)
        gap = abs(value - previous) + rounding / step
        if gap < best_gap:
            best, best_gap = value, gap
        previous, far, step = value, near, step / 2
    return best


def relative_error(numeric: float, analytic: float) -> float:
    """|numeric - analytic| over the larger of the two; 0 where both are 0.

    Infinite where one is not finite.
    """
    if not math.isfinite(numeric) or not math.isfinite(analytic):
        return math.inf
    scale = max(abs(numeric), abs(analytic))
    return abs(numeric - analytic) / scale if scale else 0.0


def check_gradients(
    name: str,
    value: Value,
    at: Mapping[str, FloatArray],
    gradients: Mapping[str, FloatArray],
    *,
    rounding: float,
    directions: int,
    bound: float,
    rng: np.random.Generator,
) -> GradientCheck:
    """Hold the gradients of `value` at a point against its derivatives along random directions.

    at: the arrays at the point; each of `gradients` belongs to the one of its name.
    rounding: how far `value` may be off near the point.
    bound: on relative errors; the derivatives are taken a hundred times as exactly.

    Raises ValueError: a gradient has another shape than its array.
    """

    def along(argument: str, v: FloatArray) -> float:
        x = at[argument]
        return derivative(
            lambda t: value(argument, x + t * v), rounding=rounding, agreement=bound / 100
        )

    max_error, worst = 0.0, next(iter(gradients))
    for argument, gradient in gradients.items():
        shape = at[argument].shape
        if gradient.shape != shape:
            raise ValueError(f"{name}: the gradient of {argument} is {gradient.shape}, not {shape}")
        for _ in range(directions):
            v = rng.standard_normal(shape)
            error = relative_error(along(argument, v), float(np.sum(gradient * v)))
            if error > max_error:
                max_error, worst = error, argument
    entry = None
    if max_error > bound:
        entry = _worst_entry(partial(along, worst), gradients[worst])
    return GradientCheck(name, max_error, bound, worst, entry)


def _worst_entry(along: Callable[[FloatArray], float], gradient: FloatArray) -> Entry:
    """Of all entries the one whose two numbers are farthest apart; along: a direction's derivative."""

    def at(place: tuple[int, ...]) -> Entry:
        unit = np.zeros_like(gradient)
        unit[place] = 1
        return Entry(place, along(unit), float(gradient[place]))

    return max(map(at, np.ndindex(gradient.shape)), key=lambda entry: entry.distance)
