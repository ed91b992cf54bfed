"""Sums: of two arrays, a block of rows a task, and of an array's numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.types import FloatArray


class Add(NamedTuple):
    """onto += x, a block of rows a task."""

    x_ND: Any
    onto_ND: Any


@tasks_of(Add)
def _add(i: int, a: Any) -> None:
    first = i * ROWS_ELEMENTWISE
    for n in range(first, min(first + ROWS_ELEMENTWISE, len(a.x_ND))):
        for d in range(a.x_ND.shape[1]):
            a.onto_ND[n, d] += a.x_ND[n, d]


class Sums:
    """See `Operations`: sums."""

    def add_sum(self, x_N: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum`. Of one number for each token: NumPy is fast enough."""
        total_1 += x_N.sum(dtype=np.float64)

    def add_in_place(self, x_ND: FloatArray, onto_ND: FloatArray) -> None:
        """See `Operations.add_in_place`."""
        tasks = blocks(len(x_ND), ROWS_ELEMENTWISE)
        run(Add(x_ND, onto_ND), tasks, macs=x_ND.size * ELEMENT_MACS)
