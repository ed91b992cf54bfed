"""Phases: one after the other within one region, each cut into numbered tasks.

A region's start costs some microseconds, and more where its threads must be woken. Work of many short
phases, each of which needs all of the one before, is therefore one region whose task i is worker i.
Every worker runs the same code: it draws tasks of a phase until none is left, then waits until those
that others have drawn are done.

Nobody waits for a worker that has not begun: what is left to draw, the others do. So workers may come
late, or one after the other on a single thread, and no result depends on who did which task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from mhmoe_np.operations.numba_cpu.compiling import task, typed_intrinsic
from mhmoe_np.operations.numba_cpu.regions import COUNTER_STRIDE, take_number
from mhmoe_np.types import IntArray

PHASE_STRIDE = 2 * COUNTER_STRIDE  # the next task's number and how many are done, a cache line each


def new_counters(phases: int) -> IntArray:
    """What the phases of a region count with; all 0 whenever it begins."""
    return np.zeros(phases * PHASE_STRIDE, np.int64)


@typed_intrinsic
def _add_number(typing_context: Any, counters: Any, i: Any, number: Any) -> Any:
    """counters[i] += number; whoever sees that sees all that was written before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        counter = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", counter, arguments[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), code


@typed_intrinsic
def _number_at(typing_context: Any, counters: Any, i: Any) -> Any:
    """counters[i], and all that was written before somebody added to it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        counter = builder.gep(array.data, [arguments[1]])
        return builder.load_atomic(counter, "acquire", 8)

    return types.int64(counters, types.int64), code


@task
def next_task(counters: Any, phase: int, tasks: int) -> int:
    """The number of a task that nobody has drawn yet; -1: there is none."""
    i = take_number(counters, phase * PHASE_STRIDE)
    return i if i < tasks else -1


@task
def end_phase(counters: Any, phase: int, done: int, tasks: int) -> None:
    """Say how many of its tasks this worker has done, and wait until all are."""
    place = phase * PHASE_STRIDE + COUNTER_STRIDE
    _add_number(counters, place, done)
    while _number_at(counters, place) < tasks:
        pass
