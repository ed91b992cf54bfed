"""The angles of rotary positions (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray


class Rotary(NamedTuple):
    """Cosine and sine of each position's and each pair's angle."""

    cos_TJ: FloatArray
    sin_TJ: FloatArray
    minus_sin_TJ: FloatArray  # for the way back

    def window(self, first: int, last: int) -> Rotary:
        """Positions first .. last-1."""
        return Rotary(*(table_TJ[first:last] for table_TJ in self))


def rotary_angles(
    positions: int, head_dim: int, theta: float, dtype: DTypeLike, *, ops: Operations
) -> Rotary:
    """Position t turns pair j by t * theta^(-2j/C), t from 0.

    Source   [spec 2]. Computed in float64, then rounded once.
    """
    frequency_J = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    angle_TJ = np.outer(np.arange(positions), frequency_J)
    tables = np.cos(angle_TJ), np.sin(angle_TJ), -np.sin(angle_TJ)
    return Rotary(*(ops.to_device(table_TJ.astype(dtype)) for table_TJ in tables))
