"""Sums of two arrays, and of an array's numbers; `sums.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.types import FloatArray

THREADS = 256
KERNELS = Kernels("sums")


class Sums(Memory):
    """See `Operations`: sums."""

    def add_in_place(self, x_ND: FloatArray, onto_ND: FloatArray) -> None:
        """See `Operations.add_in_place`."""
        grid = (blocks(x_ND.size, THREADS),)
        KERNELS.launch("add_in_place", x_ND.dtype, grid, (THREADS,), x_ND, np.int64(x_ND.size), onto_ND)

    def add_sum(self, x_N: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum`."""
        KERNELS.launch("add_sum", x_N.dtype, (1,), (THREADS,), x_N, np.int64(x_N.size), total_1)
