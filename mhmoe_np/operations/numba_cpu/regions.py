"""Regions: work cut into numbered tasks, done on one thread or shared out over all.

A region is a named tuple of everything its tasks read and write, and one function, `task(i, region)`,
declared by `@tasks_of(TheTuple)`. `run` is the only place that decides between one thread and many.

Numba gives every thread an equal number of loop turns beforehand. Where turns differ in length, or a
core is slowed by something else, the others would wait. So the loop is over workers. Each has an equal
share of neighbouring tasks, drawn one by one from a counter of its own, and helps the others with
theirs when it is done: mostly it finds in its core's cache what it wrote in the region before. No two
tasks write to one place, and what a task computes does not depend on who runs it: the same input gives
the same bits at any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types

from mhmoe_np.operations.numba_cpu.compiling import either, in_turn, parallel, task, typed_intrinsic

# Below so many multiply-adds one thread is done before a second one has woken up; on a busy machine
# waking it can take milliseconds.
SERIAL_MACS = 1 << 19

# Numbers from one worker's counter to the next: a cache line, which two cores would fight over.
COUNTER_STRIDE = 8

# What reading, changing and writing a number takes, in multiply-adds of a matrix product.
ELEMENT_MACS = 16
ROWS = 256  # rows of one task where a matrix product dominates
ROWS_ELEMENTWISE = 64  # rows of one task where memory does


@typed_intrinsic
def take_number(typing_context: Any, counters: Any, i: Any) -> Any:
    """The value of counters[i]; it is one more for whoever asks next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        counter = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counters, types.int64), code


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The value of any type that a region's fields have, its arrays without the counter of holders."""
    if isinstance(kind, types.BaseTuple):
        members: Any = kind
        parts = [
            _without_owner(context, builder, member, builder.extract_value(value, i))
            for i, member in enumerate(members)
        ]
        return context.make_tuple(builder, kind, parts)
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.meminfo.type(None)
        array.parent = array.parent.type(None)
        return array._getvalue()
    return value


@typed_intrinsic
def without_owners(typing_context: Any, region: Any) -> Any:
    """The same region, whose arrays nobody counts the holders of: who called `run` holds them.

    Otherwise every row that a task slices out would be counted, by all threads in one place: packing a
    weight on two threads took as long as on one.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owner(context, builder, region, arguments[0])

    return region(region), code


class Loops(NamedTuple):
    """The compiled loops over all tasks of one kind of region."""

    in_turn: Any  # on the calling thread
    shared_out: Any  # on all threads


LOOPS: dict[type, Loops] = {}


def tasks_of(kind: type, compiled_as: Callable[[Any], Any] = task) -> Callable[[Any], Any]:
    """Declare the decorated `function(i, region)` to be what the tasks of regions of `kind` do.

    compiled_as: `task`, or `exact` where every operation must round as written.
    Returns the compiled function, for kernels that do such a task within one of their own.
    """

    def declare(function: Any) -> Any:
        compiled = compiled_as(function)
        one_by_one, shared_out = (_loop(name, function, kind, TASK=compiled) for name in SOURCE)
        LOOPS[kind] = Loops(in_turn(one_by_one), parallel(shared_out))
        return compiled

    return declare


# Written out for each kind, because Numba takes plain arguments in a third of the time that it takes
# for a named tuple, whose names it compares, and takes no tuple inside a tuple into a parallel loop.
# No field's name begins with an underscore.
SOURCE = {
    "in_turn": """\
def in_turn(_tasks, {fields}):
    _region = without_owners(KIND({fields}))
    for _i in range(_tasks):
        TASK(_i, _region)
""",
    "shared_out": """\
def shared_out(_workers, _counters, _tasks, {fields}):
    for _worker in prange(_workers):
        _region = without_owners(KIND({fields}))
        for _next in range(_worker, _worker + _workers):
            _whose = _next % _workers
            _first, _end = _tasks * _whose // _workers, _tasks * (_whose + 1) // _workers
            _i = _first + take_number(_counters, _whose * COUNTER_STRIDE)
            while _i < _end:
                TASK(_i, _region)
                _i = _first + take_number(_counters, _whose * COUNTER_STRIDE)
""",
}


def _loop(name: str, function: Any, kind: Any, **names: Any) -> Any:
    """One loop of a kind. It claims to stand where its task does.

    Beside that file Numba keeps it; and it reads the lines there, which must be Python: since 3.12 it
    fails on those of a docstring.
    """
    above = "\n" * (function.__code__.co_firstlineno - 1)
    source = above + SOURCE[name].format(fields=", ".join(kind._fields))
    scope = {"KIND": kind, "prange": prange, "COUNTER_STRIDE": COUNTER_STRIDE, **names}
    scope |= {"take_number": take_number, "without_owners": without_owners}
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
        loops.in_turn(tasks, *region)
        return
    workers = get_num_threads()
    counters = np.zeros(workers * COUNTER_STRIDE, np.int64)
    loops.shared_out(workers, counters, tasks, *region)
