"""How far from a vector an honest implementation may be: derived, not guessed.

Every number that an implementation holds is rounded, and every implementation rounds differently. How
much that moves a result is measured on the definition itself in float64: the arguments, and whatever an
operation returns, are disturbed by one part in 2^30, each number up or down at random. How far the
result moves, divided by that part, is what one rounding of everything does to it; a result is at least
rounded itself. A float type's tolerance is so many of its roundings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.conformance.vector import Outcome, Vector
from mhmoe_np.operations.door import Door, Promise
from mhmoe_np.operations.table import Operations

ROUNDINGS = 16  # sums of some ten terms, `exp` of two roundings and a half, and the worst of many
DISTURBANCE = 2.0**-30
TRIALS = 4
DIGITS = 2  # of a tolerance


class _Visit:
    """One call: what it returns is disturbed in place."""

    def __init__(self, disturb: Disturbed) -> None:
        self._disturb = disturb

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """The caller's arrays stay as they are."""

    def leave(self, results: Sequence[Any]) -> None:
        """See `Disturbed`."""
        for array in results:
            if array is not None and array.dtype.kind == "f":
                array *= self._disturb.factors(array)


class Disturbed(Door):
    """Operations each result of which is off by the same part, up or down at random.

    Attributes:
        called: the operations that were called.
    """

    def __init__(self, ops: Operations, part: float, rng: np.random.Generator) -> None:
        super().__init__(ops)
        self._part, self._rng = part, rng
        self.called: set[str] = set()

    def visit(self, operation: str, promise: Promise) -> _Visit:
        """See `Door.visit`."""
        self.called.add(operation)
        return _Visit(self)

    def factors(self, array: NDArray[Any]) -> NDArray[Any]:
        """1 plus or minus the part, for each number; 1 where every float type holds it exactly.

        Numbers of so few bits are not rounded, and vectors use them where a rounding would decide.
        """
        signs = self._rng.integers(0, 2, array.shape) * 2 - 1
        with np.errstate(over="ignore"):
            is_held = array == array.astype(np.float16)
        return np.where(is_held, 1, 1 + self._part * signs).astype(array.dtype)


def disturbed(vector: Vector, ops: Operations, *, part: float, trial: int) -> Outcome:
    """The vector's outcome in float64 where every number is off by that part of itself."""
    unsteady = Disturbed(ops, part, np.random.default_rng(trial))
    given = vector.given(np.float64)
    for name, array in {**vector.arguments, **vector.upstream}.items():
        if array.dtype == np.float32:
            given[name] = given[name] * unsteady.factors(given[name])
    return vector.compute(cast(Operations, unsteady), given, vector.options)


def recorded(vector: Vector, ops: Operations) -> tuple[Outcome, set[str]]:
    """The outcome in float64, undisturbed, and the operations that it took."""
    recording = Disturbed(ops, 0.0, np.random.default_rng(0))
    outcome = vector.outcome(cast(Operations, recording), np.float64)
    return outcome, recording.called


def tolerances(vector: Vector, outcome: Outcome, ops: Operations) -> dict[str, dict[str, float]]:
    """For each float tensor of the outcome: float type -> how far any of its numbers may be off."""
    expected = {name: t for name, t in outcome.tensors.items() if t.dtype.kind == "f"}
    growth = {name: _largest(tensor) for name, tensor in expected.items()}
    for trial in range(TRIALS):
        moved = disturbed(vector, ops, part=DISTURBANCE, trial=trial).tensors
        for name, tensor in expected.items():
            distance = _largest(moved[name] - tensor) / DISTURBANCE
            growth[name] = max(growth[name], distance)
    return {
        name: {
            str(np.dtype(dtype)): _rounded_up(ROUNDINGS * float(np.finfo(dtype).eps) * grown)
            for dtype in (np.float64, np.float32)
        }
        for name, grown in growth.items()
    }


def _largest(array: NDArray[Any]) -> float:
    return float(np.abs(array).max(initial=0))


def _rounded_up(value: float) -> float:
    """To few digits, which a reader can take in and which last bits do not change."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(value)) + 1 - DIGITS)
    return float(f"{np.ceil(value / unit) * unit:.{DIGITS - 1}e}")
