"""Sorting the router's choices by expert: a counting sort; `dispatch.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.table import Dispatch
from mhmoe_np.types import IntArray

THREADS, WARP = 256, 32
SEGMENT = 256  # choices that one warp places, in order
LONG_SEGMENT, MANY = 1024, 4096  # of that many experts, as a vocabulary has: fewer counts of each
KERNELS = Kernels("dispatch")


class DispatchOperations(Memory):
    """See `Operations`: dispatch."""

    def dispatch(self, expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
        """See `Operations.dispatch`.

        How many rows a capacity leaves is known on the device alone, as start_Z[E]. So route_R has
        room for as many as there may be, min(M K, E capacity), and holds -1 in those beyond.
        """
        M, K = expert_MK.shape
        limit = M * K if capacity is None else min(capacity, M * K)
        rows = min(M * K, experts * limit)
        route_R = self.empty((rows,), np.int64)
        slot_MK = self.empty((M, K), np.int64)
        start_Z = self.empty((experts + 1,), np.int64)
        segment = SEGMENT if experts < MANY else LONG_SEGMENT
        segments = max(1, blocks(M * K, segment))
        given = expert_MK, M, K, experts, segment
        with self.scope():
            counts = self.empty((segments, experts), np.int32)
            blocks_done_1 = self.empty((1,), np.uint32)
            KERNELS.launch(
                "count_choices", np.float32, (segments,), (THREADS,), *given, counts, blocks_done_1
            )
            KERNELS.launch(
                "place_segments",
                np.float32,
                (blocks(experts, WARP),),
                (WARP, 32),
                *(counts, segments, experts, limit, blocks_done_1, start_Z),
            )
            KERNELS.launch(
                "place_choices",
                np.float32,
                (segments,),
                (WARP,),
                *(*given, counts, start_Z, rows, route_R, slot_MK),
            )
        return Dispatch(route_R, slot_MK, start_Z)
