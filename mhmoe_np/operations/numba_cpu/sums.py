"""Sums of two arrays, and of an array's numbers: bound by memory, NumPy is as fast as any kernel."""

from __future__ import annotations

import numpy as np

from mhmoe_np.types import FloatArray


class Sums:
    """See `Operations`: sums."""

    def add_sum(self, x_N: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum`. Of one number for each token: NumPy is fast enough."""
        total_1 += x_N.sum(dtype=np.float64)

    def add_in_place(self, x_ND: FloatArray, onto_ND: FloatArray) -> None:
        """See `Operations.add_in_place`."""
        onto_ND += x_ND
