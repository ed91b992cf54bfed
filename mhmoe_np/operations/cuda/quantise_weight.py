"""BitNet's weights: integers and a scale for each of many joined matrices (`quantise_weight.cu`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.table import Quantization
from mhmoe_np.settings.run import Matmul
from mhmoe_np.types import FloatArray

THREADS = 256
CHUNK = 8192  # numbers of a block: twice what its threads hold at once
LIMBS = {"float32": 10, "float64": 68}
KERNELS = Kernels("quantise_weight")


class Chunks(NamedTuple):
    """How joined matrices are cut; on the device."""

    start_X: Any  # int64: the rows at which matrices start, and their number
    chunk_C3: Any  # int64: matrix, first and last of each block's numbers


class QuantiseWeight(Memory):
    """See `Operations`: quantisation of weights."""

    def __init__(self, *, keep_buffers: bool, matmul: Matmul) -> None:
        super().__init__(keep_buffers=keep_buffers, matmul=matmul)
        self._chunks: dict[tuple[tuple[int, ...], int], Chunks] = {}

    def quantise_weight(
        self,
        w_OI: FloatArray,
        starts: tuple[int, ...],
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
        report_X5: FloatArray,
    ) -> None:
        """See `Operations.quantise_weight`. The first call with these `starts` copies them over."""
        X, I, centred = len(starts) - 1, w_OI.shape[1], int(quantization == "bitnet")
        start_X, chunk_C3 = self._chunks_of(starts, I)
        dtype, many, one = w_OI.dtype, (len(chunk_C3),), (THREADS,)
        with self.scope():
            # Both sums of each matrix and how many of its numbers are not finite; then its counts.
            places = 2 * LIMBS[dtype.name] + 1
            sums_and_counts = self.empty((X * (places + 4),), np.uint64)
            sums_and_counts[...] = 0
            limbs_XJ, count_X4 = sums_and_counts[: X * places], sums_and_counts[X * places :]
            mean_X2 = self.empty((X, 2), dtype)
            KERNELS.launch("sum_exactly", dtype, many, one, w_OI, chunk_C3, centred, limbs_XJ)
            sizes = X, I, centred
            grid = (blocks(2 * X, THREADS),)
            KERNELS.launch("means_of_sums", dtype, grid, one, limbs_XJ, start_X, *sizes, mean_X2)
            results = q_OI, beta_O, count_X4
            KERNELS.launch(
                "quantise_chunks", dtype, many, one, w_OI, chunk_C3, I, centred, mean_X2, *results
            )
            grid = (blocks(X, THREADS),)
            KERNELS.launch("report_matrices", dtype, grid, one, mean_X2, count_X4, X, report_X5)

    def _chunks_of(self, starts: tuple[int, ...], inputs: int) -> Chunks:
        """The device's copy of where matrices start, and of how they are cut; made once."""
        key = starts, inputs
        if key not in self._chunks:
            cut = [
                (x, begin, min(begin + CHUNK, last * inputs))
                for x, (first, last) in enumerate(pairwise(starts))
                for begin in range(first * inputs, last * inputs, CHUNK)
            ]
            table = np.array(cut, np.int64).reshape(-1, 3)
            rows = np.array(starts, np.int64)
            self._chunks[key] = Chunks(self.to_device(rows), self.to_device(table))
        return self._chunks[key]
