"""Rows sorted by expert: the spans of them that tasks take, gathering, and the gated sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.regions import ROWS_ELEMENTWISE, blocks, run, tasks_of
from mhmoe_np.types import FloatArray, IntArray


@task
def spans_of(start_Z: Any, rows: int) -> Any:
    """[expert, first row, last row + 1] of each task: an expert's in equal parts of about `rows`."""
    parts_E = np.empty(len(start_Z) - 1, np.int64)
    for e in range(len(parts_E)):
        count = start_Z[e + 1] - start_Z[e]
        parts_E[e] = max((count + rows // 2) // rows, min(count, 1))
    spans = np.empty((parts_E.sum(), 3), np.int64)
    i = 0
    for e in range(len(parts_E)):
        first, count = start_Z[e], start_Z[e + 1] - start_Z[e]
        for part in range(parts_E[e]):
            spans[i, 0] = e
            spans[i, 1] = first + count * part // parts_E[e]
            spans[i, 2] = first + count * (part + 1) // parts_E[e]
            i += 1
    return spans


@task
def gather(x_MU: Any, route_R: Any, choices: int) -> Any:
    """The sub-token of each row, `choices` being how many experts each has (K)."""
    out_RU = np.empty((len(route_R), x_MU.shape[1]), x_MU.dtype)
    for r in range(len(route_R)):
        x_U, out_U = x_MU[route_R[r] // choices], out_RU[r]
        for u in range(len(out_U)):
            out_U[u] = x_U[u]
    return out_RU


class GatedSums(NamedTuple):
    """The sums of sub-tokens' rows, a block of sub-tokens a task."""

    y_RU: Any
    gate_MK: Any
    slot_MK: Any
    y_MU: Any  # written


@tasks_of(GatedSums)
def _combine_block(i: int, a: Any) -> None:
    first = i * ROWS_ELEMENTWISE
    for m in range(first, min(first + ROWS_ELEMENTWISE, len(a.y_MU))):
        y_U = a.y_MU[m]
        y_U[:] = 0
        for j in range(a.slot_MK.shape[1]):
            if a.slot_MK[m, j] >= 0:
                row_U, gate = a.y_RU[a.slot_MK[m, j]], a.gate_MK[m, j]
                for u in range(len(y_U)):
                    y_U[u] += gate * row_U[u]


def combine(y_RU: FloatArray, gate_MK: FloatArray, slot_MK: IntArray, y_MU: FloatArray) -> None:
    """y[m] = sum_j gate[m, j] * row[slot[m, j]]."""
    tasks = blocks(len(y_MU), ROWS_ELEMENTWISE)
    run(GatedSums(y_RU, gate_MK, slot_MK, y_MU), tasks, macs=slot_MK.size * y_MU.shape[1])
