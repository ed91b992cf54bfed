"""What a vector is: one computation of known arguments, its results and its gradients.

The gradients are those of the sum of all results, each times its upstream gradient: what is called
`dy_NO` among the upstream gradients belongs to the result `y_NO`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray

Arrays = Mapping[str, NDArray[Any]]
Options = Mapping[str, Any]


class Outcome(NamedTuple):
    """What a computation came to."""

    results: Arrays
    gradients: Arrays

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """Both, by name."""
        return {**self.results, **self.gradients}


class Vector(NamedTuple):
    """One computation at one point.

    name: its subject, a slash, its case.
    about: what the case is there for.
    compute: the operations, arguments and upstream gradients by name, and the options.
    arguments, upstream: integers, booleans and float32 numbers, which every float type holds; what is
    float64 (as the table says of some arrays) stays so.
    functions: whose docstrings say what is computed, beside those of the operations that are called.
    """

    name: str
    about: str
    compute: Callable[[Operations, Arrays, Options], Outcome]
    arguments: Arrays
    upstream: Arrays = {}  # noqa: RUF012  # nobody changes it
    options: Options = {}  # noqa: RUF012
    functions: tuple[Callable[..., Any], ...] = ()

    @property
    def subject(self) -> str:
        """The name before the slash."""
        return self.name.partition("/")[0]

    def given(self, dtype: DTypeLike) -> dict[str, NDArray[Any]]:
        """Copies of arguments and upstream gradients, float32 numbers in `dtype`."""
        return {
            name: array.astype(dtype) if array.dtype == np.float32 else array.copy()
            for name, array in {**self.arguments, **self.upstream}.items()
        }

    def outcome(self, ops: Operations, dtype: DTypeLike) -> Outcome:
        """What these operations make of it in `dtype`."""
        return self.compute(ops, self.given(dtype), self.options)


class Draw:
    """Random arguments of one vector, the same on every machine.

    A float is the sum of three uniform numbers: about normal, and made without a function of which
    two libraries might round differently.
    """

    def __init__(self, name: str, *, draw: int = 0) -> None:
        """draw: another one, where the first has a choice or a quantiser near a tie."""
        digest = hashlib.sha256(name.encode()).digest()
        self._rng = np.random.default_rng([draw, int.from_bytes(digest[:8], "little")])

    def __call__(self, *shape: int, scale: float = 1.0) -> FloatArray:
        """float32, mean 0, standard deviation `scale`.

        Shapes   -> [shape]
        """
        return ((self._rng.random((3, *shape)).sum(axis=0) - 1.5) * (2 * scale)).astype(np.float32)

    def integers(self, below: int, *shape: int) -> IntArray:
        """int64, from 0 on.

        Shapes   -> [shape]
        """
        return self._rng.integers(0, below, shape)

    def choices(self, sub_tokens: int, experts: int, top_k: int) -> IntArray:
        """Different experts for each sub-token.

        Shapes   -> [sub_tokens, top_k]
        """
        order = np.argsort(self._rng.random((sub_tokens, experts)), axis=1)
        return np.ascontiguousarray(order[:, :top_k])


def present(arrays: Mapping[str, NDArray[Any] | None]) -> dict[str, NDArray[Any]]:
    """Without those that are absent."""
    return {name: array for name, array in arrays.items() if array is not None}
