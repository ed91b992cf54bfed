"""Regions: work cut into numbered tasks, done on one thread or shared out over all.

A region is a named tuple of everything its tasks read and write, and one function, `task(i, region)`,
declared by `@tasks_of(TheTuple)`. `run` is the only place that decides between one thread and many.

Numba gives every thread an equal number of loop turns beforehand. Where turns differ in length, or a
core is slowed by something else, the others would wait. So the loop is over workers, and these draw the
numbers of their tasks from a common counter. No two tasks write to one place, and what a task computes
does not depend on who runs it: the same input gives the same bits at any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types
from numba.extending import overload

from mhmoe_np.operations.numba_cpu.compiling import exact, parallel, task, typed_intrinsic

# Below so many multiply-adds one thread is done before a second one has woken up; on a busy machine
# waking it can take milliseconds.
SERIAL_MACS = 1 << 19


def run_task(i: int, region: Any) -> None:
    """Task number i of a region, whichever its kind is."""
    raise NotImplementedError("compiled code only")


def tasks_of(kind: type, compiled_as: Callable[[Any], Any] = task) -> Callable[[Any], Any]:
    """Declare the decorated `function(i, region)` to be what the tasks of regions of `kind` do.

    compiled_as: `task`, or `exact` where every operation must round as written.
    """

    def declare(function: Any) -> Any:
        compiled = compiled_as(function)

        def call(i: int, region: Any) -> None:
            compiled(i, region)

        @overload(run_task, strict=False)
        def choose(i: Any, region: Any) -> Any:
            return call if getattr(region, "instance_class", None) is kind else None

        return compiled

    return declare


@typed_intrinsic
def take_number(typing_context: Any, counter: Any) -> Any:
    """The counter's value; it is one more for whoever asks next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


@exact
def _in_turn(tasks: int, region: Any) -> None:
    """All tasks on the calling thread."""
    for i in range(tasks):
        run_task(i, region)


@exact
def _worker(counter: Any, tasks: int, region: Any) -> None:
    """The tasks that one thread gets hold of."""
    while True:
        i = take_number(counter)
        if i >= tasks:
            return
        run_task(i, region)


@parallel
def _shared_out(workers: int, counter: Any, tasks: int, region: Any) -> None:
    """All tasks on all threads."""
    for _ in prange(workers):
        _worker(counter, tasks, region)


def run(region: Any, tasks: int, *, macs: int, serial: int = SERIAL_MACS) -> None:
    """Do tasks 0 .. tasks-1 of a region.

    macs: about how many multiply-adds they are together; up to `serial` of them one thread does all.
    Numba cannot cancel a region: what a task cannot do must be refused before.
    """
    if tasks == 1 or macs <= serial:
        _in_turn(tasks, region)
    else:
        _shared_out(get_num_threads(), np.zeros(1, np.int64), tasks, region)


def workers() -> Any:
    """How many there are, and their counter."""
    return get_num_threads(), np.zeros(1, np.int64)
