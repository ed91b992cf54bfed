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
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, types

from mhmoe_np.operations.numba_cpu.compiling import either, parallel, task, typed_intrinsic

# Below so many multiply-adds one thread is done before a second one has woken up; on a busy machine
# waking it can take milliseconds.
SERIAL_MACS = 1 << 19


# What reading, changing and writing a number takes, in multiply-adds of a matrix product.
ELEMENT_MACS = 16
ROWS = 256  # rows of one task where a matrix product dominates
ROWS_ELEMENTWISE = 64  # rows of one task where memory does


@typed_intrinsic
def take_number(typing_context: Any, counter: Any) -> Any:
    """The counter's value; it is one more for whoever asks next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


class Loops(NamedTuple):
    """The compiled loops of one kind of region, over tasks that are numbered by a counter."""

    work: Any  # the tasks that one thread gets hold of; all of them in turn without a counter
    shared_out: Any  # all tasks on all threads


LOOPS: dict[type, Loops] = {}
ALONE = np.empty(0, np.int64)  # in a counter's place: nobody else draws numbers


def tasks_of(kind: type, compiled_as: Callable[[Any], Any] = task) -> Callable[[Any], Any]:
    """Declare the decorated `function(i, region)` to be what the tasks of regions of `kind` do.

    compiled_as: `task`, or `exact` where every operation must round as written.
    Returns the compiled function, for kernels that do such a task within one of their own.
    """

    def declare(function: Any) -> Any:
        compiled = compiled_as(function)
        inlined = njit(inline="always")(function)  # a function fewer to compile
        work = compiled_as(_loop("work", function, kind, TASK=inlined))
        LOOPS[kind] = Loops(work, parallel(_loop("shared_out", function, kind, WORK=work)))
        return compiled

    return declare


# Written out for each kind, because Numba takes plain arguments in a third of the time that it takes
# for a named tuple, whose names it compares, and takes no tuple inside a tuple into a parallel loop.
# No field's name begins with an underscore.
SOURCE = {
    "work": """
def work(_counter, _tasks, {fields}):
    _region = KIND({fields})
    _i = 0
    while True:
        if len(_counter) > 0:
            _i = take_number(_counter)
        if _i >= _tasks:
            return
        TASK(_i, _region)
        _i += 1
""",
    "shared_out": """
def shared_out(_workers, _counter, _tasks, {fields}):
    for _ in prange(_workers):
        WORK(_counter, _tasks, {fields})
""",
}


def _loop(name: str, function: Any, kind: Any, **names: Any) -> Any:
    """One loop of a kind. It claims its task's file, beside which Numba then keeps it."""
    source = SOURCE[name].format(fields=", ".join(kind._fields))
    scope = {"KIND": kind, "prange": prange, "take_number": take_number, **names}
    exec(compile(source, function.__code__.co_filename, "exec"), scope)
    loop: Any = scope[name]
    loop.__module__, loop.__qualname__ = function.__module__, f"{function.__qualname__}_{name}"
    return loop


@either
def blocks(length: int, size: int) -> int:
    """How many blocks of `size` cover `length`."""
    return -(-length // size)


@either
def block(i: int, size: int) -> Any:
    """Block number i as a slice."""
    return slice(i * size, (i + 1) * size)


def run(region: tuple[Any, ...], tasks: int, *, macs: int, serial: int = SERIAL_MACS) -> None:
    """Do tasks 0 .. tasks-1 of a region.

    macs: about how many multiply-adds they are together; up to `serial` of them one thread does all.
    Numba cannot cancel a region: what a task cannot do must be refused before.
    """
    loops = LOOPS[type(region)]
    if tasks == 1 or macs <= serial:
        loops.work(ALONE, tasks, *region)
    else:
        loops.shared_out(get_num_threads(), np.zeros(1, np.int64), tasks, *region)
