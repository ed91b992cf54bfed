"""AdamW on one flat buffer, and the norm that clipping needs; `optimiser.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.types import FloatArray

THREADS, WARP = 256, 32
CHUNK = 8192  # numbers whose squares one block adds up
NUMBERS_OF_BLOCK = 4 * THREADS  # of the parameters
FACTORS = 10
KERNELS = Kernels("optimiser")


class Optimiser(Memory):
    """See `Operations`: the optimiser."""

    def add_sum_of_squares(self, x_P: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum_of_squares`."""
        P, dtype, count = x_P.size, x_P.dtype, blocks(x_P.size, CHUNK)
        with self.scope():
            chunks = self.empty((count,), np.float64)
            KERNELS.launch("sum_of_squares", dtype, (count,), (THREADS,), x_P, np.int64(P), chunks)
            KERNELS.launch("add_sum_of_squares", dtype, (1,), (THREADS,), chunks, count, total_1)

    def adamw_in_place(
        self,
        parameter_P: FloatArray,
        gradient_P: FloatArray,
        first_moment_P: FloatArray,
        second_moment_P: FloatArray,
        squares_1: FloatArray,
        guard: FloatArray,
        left_out_1: FloatArray,
        update_8: FloatArray,
    ) -> None:
        """See `Operations.adamw_in_place`."""
        P, dtype = parameter_P.size, parameter_P.dtype
        arrays = parameter_P, gradient_P, first_moment_P, second_moment_P
        with self.scope():
            factors = self.empty((FACTORS,), dtype)
            goes_on_1 = self.empty((1,), np.bool_)
            count_1 = self.empty((1,), np.uint64)
            KERNELS.launch(
                "adamw_begins",
                dtype,
                (1,),
                (THREADS,),
                *(squares_1, guard, np.int64(guard.size), update_8, factors, goes_on_1, count_1),
            )
            KERNELS.launch(
                "adamw",
                dtype,
                (blocks(P, NUMBERS_OF_BLOCK),),
                (THREADS,),
                *(*arrays, np.int64(P), factors, goes_on_1, count_1),
            )
            KERNELS.launch("adamw_ends", dtype, (1,), (WARP,), count_1, left_out_1)
