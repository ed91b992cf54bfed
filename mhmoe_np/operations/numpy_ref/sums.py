"""Sums: of two arrays, and of an array's numbers."""

from __future__ import annotations

import numpy as np

from mhmoe_np.types import FloatArray


def add_in_place(x_ND: FloatArray, onto_ND: FloatArray) -> None:
    """See `Operations.add_in_place`."""
    onto_ND += x_ND


def add_sum(x_N: FloatArray, total_1: FloatArray) -> None:
    """See `Operations.add_sum`."""
    total_1 += x_N.sum(dtype=np.float64)


def added(dx_ND: FloatArray, onto_ND: FloatArray | None) -> FloatArray:
    """dx, or `onto` with dx added to it."""
    if onto_ND is None:
        return dx_ND
    onto_ND += dx_ND
    return onto_ND
