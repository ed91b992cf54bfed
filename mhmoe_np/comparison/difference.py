"""How far two tensors are apart: absolute, relative, in units of the last place, in direction.

Relative means against the largest magnitude in either tensor, never element by element: an element near
0 is a difference of large terms, and its own last digits mean nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[Any]

TOLERANCES = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 2e-5}
"""The largest relative difference that rounding explains, by the coarser dtype of the two."""


def reach_of_tie(dtype: np.dtype[Any]) -> float:
    """How near to half-way between two integers an activation's x * 127/gamma counts as a tie [D9].

    Errors of x show there 127-fold.
    """
    return 127 * TOLERANCES[dtype] / 10


class Difference(NamedTuple):
    """Two tensors of one shape, and where they are farthest apart."""

    max_abs: float
    max_rel: float  # against the largest magnitude of both
    max_ulp: int | None  # None: of integers, or not finite
    cosine: float | None  # 1 - cos of the angle between them; None: as above, or one of them is 0
    place: tuple[int, ...]  # of the worst element
    first: float  # there
    second: float


def coarser(a: Tensor, b: Tensor) -> np.dtype[Any]:
    """The dtype in which two float tensors can agree at best."""
    return min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def difference(a: Tensor, b: Tensor) -> Difference:
    """Of two tensors of one shape: floats, or integers.

    A number that is not finite differs by infinity, unless the other is the same.
    """
    if a.size == 0:
        return Difference(0.0, 0.0, 0, 0.0, (), np.nan, np.nan)
    wide, other = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(wide - other)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    gap = np.where(same, 0.0, np.where(np.isfinite(gap), gap, np.inf))
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(gap)), gap.shape))
    largest, scale = float(gap[place]), max(_largest(wide), _largest(other))
    relative = largest / scale if scale > 0 else (np.inf if largest > 0 else 0.0)
    finite = bool(np.isfinite(wide).all() and np.isfinite(other).all())
    measured = finite and a.dtype.kind == b.dtype.kind == "f"
    return Difference(
        largest,
        relative,
        _ulps(a, b) if measured else None,
        _cosine(wide, other) if measured else None,
        place,
        float(wide[place]),
        float(other[place]),
    )


def _largest(tensor: Tensor) -> float:
    return float(np.abs(tensor[np.isfinite(tensor)]).max(initial=0.0))


def _ulps(a: Tensor, b: Tensor) -> int:
    """The most representable numbers from an element to its counterpart; 0 and -0 are one."""
    dtype = coarser(a, b)
    bits = 8 * dtype.itemsize
    zero = np.uint64(1 << (bits - 1))  # the sign bit, and where 0 stands among all numbers

    def ordinal(tensor: Tensor) -> Tensor:
        with np.errstate(over="ignore"):
            code = tensor.astype(dtype).ravel().view(f"u{dtype.itemsize}").astype(np.uint64)
        magnitude = code & (zero - np.uint64(1))
        return np.where(code & zero, zero - magnitude, zero + magnitude)

    first, second = ordinal(a), ordinal(b)
    return int((np.maximum(first, second) - np.minimum(first, second)).max())


def _cosine(a: Tensor, b: Tensor) -> float | None:
    x, y = a.ravel() / (_largest(a) or 1.0), b.ravel() / (_largest(b) or 1.0)
    length, other = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if length == 0 or other == 0:
        return 0.0 if length == other else None
    # 1 - cos = |x - y|^2 / 2 of unit vectors, which keeps the digits that the subtraction would lose.
    return float(np.sum(np.square(x / length - y / other)) / 2)
