"""Sorting the router's choices by expert: a counting sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.table import Dispatch
from mhmoe_np.types import IntArray


@task
def _counting_sort(expert_MK: Any, capacity: int, route_R: Any, slot_MK: Any, start_Z: Any) -> int:
    """Fill the three of a `Dispatch`; return how many rows there are."""
    M, K = expert_MK.shape
    start_Z[:] = 0
    for m in range(M):
        for j in range(K):
            start_Z[expert_MK[m, j] + 1] += 1
    for e in range(len(start_Z) - 1):
        start_Z[e + 1] = start_Z[e] + min(start_Z[e + 1], capacity)
    next_E = start_Z[:-1].copy()
    for j in range(K):
        for m in range(M):
            e = expert_MK[m, j]
            slot = next_E[e]
            if slot < start_Z[e + 1]:
                next_E[e] = slot + 1
                slot_MK[m, j] = slot
                route_R[slot] = m * K + j
            else:
                slot_MK[m, j] = -1
    return start_Z[-1]


class DispatchOperations(Buffers):
    """See `Operations`: dispatch."""

    def dispatch(self, expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
        """See `Operations.dispatch`."""
        slot_MK = self.empty(expert_MK.shape, np.int64)
        route = self.empty((expert_MK.size,), np.int64)
        start_Z = self.empty((experts + 1,), np.int64)
        limit = len(expert_MK) if capacity is None else capacity
        R = _counting_sort(expert_MK, limit, route, slot_MK, start_Z)
        return Dispatch(route[:R], slot_MK, start_Z)
