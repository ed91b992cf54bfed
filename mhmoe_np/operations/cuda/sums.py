"""Sums of two arrays, of an array's numbers, and of its columns; `sums.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.types import FloatArray

THREADS = 256
COLUMNS = 32  # of a block that sums columns
STAGE_ROWS = 256  # at least that many make one partial sum
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

    def _add_column_sums(self, x_NO: FloatArray, onto_O: FloatArray) -> None:
        """onto += the sum of x's rows: first by blocks of them, then of these, as the sizes say."""
        N, O = x_NO.shape
        parts = min(blocks(N, STAGE_ROWS), STAGE_ROWS)
        if parts == 0:
            return
        rows = blocks(N, parts)
        parts = blocks(N, rows)
        with self.scope():
            sums_BO = self.empty((parts, O), x_NO.dtype)
            self._column_sums(x_NO, rows, sums_BO, add=False)
            self._column_sums(sums_BO, parts, onto_O, add=True)

    @staticmethod
    def _column_sums(x_NO: FloatArray, rows: int, sums: FloatArray, *, add: bool) -> None:
        N, O = x_NO.shape
        grid = blocks(N, rows), blocks(O, COLUMNS)
        block = COLUMNS, THREADS // COLUMNS
        KERNELS.launch("column_sums", x_NO.dtype, grid, block, x_NO, N, O, rows, sums, add)
