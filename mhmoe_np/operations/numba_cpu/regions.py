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
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed

from mhmoe_np.operations.numba_cpu.compiling import exact, parallel, task, typed_intrinsic

# Below so many multiply-adds one thread is done before a second one has woken up; on a busy machine
# waking it can take milliseconds.
SERIAL_MACS = 1 << 19


class Loops(NamedTuple):
    """The two compiled loops over the tasks of one kind of region."""

    work: Any
    shared_out: Any


borrowed: Callable[..., Any] = impl_ret_borrowed  # Numba counts whoever holds an array

LOOPS: dict[type, Loops] = {}
_ALONE = np.empty(0, np.int64)  # in the place of a counter: nobody else draws numbers


def tasks_of(kind: type, compiled_as: Callable[[Any], Any] = task) -> Callable[[Any], Any]:
    """Declare the decorated `function(i, region)` to be what the tasks of regions of `kind` do.

    compiled_as: `task`, or `exact` where every operation must round as written.
    Returns the compiled function, for kernels that do such a task within one of their own.
    """

    def declare(function: Any) -> Any:
        compiled = compiled_as(function)
        work = exact(_for_task(function, _work, KIND=kind, TASK=compiled))
        shared_out = parallel(_for_task(function, _shared_out, WORK=work))
        LOOPS[kind] = Loops(work, shared_out)
        return compiled

    return declare


KIND: Any = None  # in each task's copy of the loops: the region's tuple,
TASK: Any = None  # the compiled task
WORK: Any = None  # and the compiled loop of one thread


def _for_task(function: Any, loop: Any, **names: Any) -> Any:
    """A copy of a loop in which the given names stand for what belongs to one task.

    With one common loop, in which Numba finds the task by the tuple's type, small calls would take half
    as long again: it compares the names of all fields. The copy seems to stand where the task does;
    Numba names and dates the files of its cache by that.
    """
    code = loop.__code__.replace(
        co_filename=function.__code__.co_filename, co_firstlineno=function.__code__.co_firstlineno
    )
    copy = FunctionType(code, {**loop.__globals__, **names}, loop.__name__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__ + loop.__name__
    return copy


@typed_intrinsic
def take_number(typing_context: Any, counter: Any) -> Any:
    """The counter's value; it is one more for whoever asks next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


@typed_intrinsic
def address_of(typing_context: Any, fields: Any) -> Any:
    """Where the fields lie while the calling function runs.

    A parallel loop takes tuples apart and cannot take one within another, such as a weight in a region;
    an address it passes on as it is.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        allocate: Callable[..., Any] = cgutils.alloca_once
        address = allocate(builder, context.get_data_type(fields))
        context.pack_value(builder, fields, arguments[0], address)
        return address

    return types.CPointer(fields)(fields), code  # type: ignore[no-untyped-call]


@typed_intrinsic
def fields_at(typing_context: Any, address: Any) -> Any:
    """The fields at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fields = context.unpack_value(builder, address.dtype, arguments[0])
        return borrowed(context, builder, address.dtype, fields)

    return address.dtype(address), code


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
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

    Otherwise every row that a task slices out would be counted, by all threads in one place.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owner(context, builder, region, arguments[0])

    return region(region), code


def _work(counter: Any, tasks: int, fields: Any) -> None:
    """The tasks that one thread gets hold of; without a counter, all of them in turn."""
    region = without_owners(KIND(*fields))
    i = 0
    while True:
        if len(counter) > 0:
            i = take_number(counter)
        if i >= tasks:
            return
        TASK(i, region)
        i += 1


def _shared_out(workers: int, tasks: int, fields: Any) -> None:
    """All tasks on all threads."""
    counter = np.empty(1, np.int64)
    counter[0] = 0
    address = address_of(fields)
    for _ in prange(workers):
        WORK(counter, tasks, fields_at(address))


def run(region: tuple[Any, ...], tasks: int, *, macs: int, serial: int = SERIAL_MACS) -> None:
    """Do tasks 0 .. tasks-1 of a region.

    macs: about how many multiply-adds they are together; up to `serial` of them one thread does all.
    Numba cannot cancel a region: what a task cannot do must be refused before.
    """
    loops = LOOPS[type(region)]
    if tasks == 1 or macs <= serial:
        loops.work(_ALONE, tasks, tuple(region))
    else:
        loops.shared_out(get_num_threads(), tasks, tuple(region))


def workers() -> Any:
    """How many there are, and their counter."""
    return get_num_threads(), np.zeros(1, np.int64)
