"""The angles of rotary positions (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.types import FloatArray


class Rotary(NamedTuple):
    """Cosine and sine of each position's and each pair's angle."""

    cos_TJ: FloatArray
    sin_TJ: FloatArray

    def window(self, first: int, last: int) -> Rotary:
        """Positions first .. last-1."""
        return Rotary(self.cos_TJ[first:last], self.sin_TJ[first:last])


def rotary_angles(positions: int, head_dim: int, theta: float, dtype: DTypeLike) -> Rotary:
    """Position t turns pair j by t * theta^(-2j/C), t from 0.

    Source   [spec 2]. Computed in float64, then rounded once.
    """
    frequency_J = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    angle_TJ = np.outer(np.arange(positions), frequency_J)
    return Rotary(np.cos(angle_TJ).astype(dtype), np.sin(angle_TJ).astype(dtype))
