"""The angles of rotary positions (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray


class Rotary(NamedTuple):
    """Cosine and sine of each pair's angle at all positions of a model, and where one begins."""

    cos_YJ: FloatArray
    sin_YJ: FloatArray
    minus_sin_YJ: FloatArray  # for the way back
    first_1: IntArray | None = None  # position of the first token being computed; None: 0


def rotary_tables(
    positions: int, head_dim: int, theta: float, dtype: DTypeLike, *, ops: Operations
) -> Rotary:
    r"""Position y turns pair j by y * theta^(-2j/C), y from 0.

    Computed in float64, then rounded once.

    Equation \varphi_{yj} = y \cdot \mathrm{theta}^{-2j/C}
    Shapes   -> cos_YJ, sin_YJ, minus_sin_YJ
    Source   [spec 2 RoPE]
    """
    frequency_J = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    angle_YJ = np.outer(np.arange(positions), frequency_J)
    tables = np.cos(angle_YJ), np.sin(angle_YJ), -np.sin(angle_YJ)
    return Rotary(*(ops.to_device(table_YJ.astype(dtype)) for table_YJ in tables))
