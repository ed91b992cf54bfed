"""Regions: every task is done once, and it does not matter by whom."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.packed import Packed
from mhmoe_np.operations.numba_cpu.regions import COUNTER_STRIDE, LOOPS, Loops, run, tasks_of
from tests.operations.cases import NUMBA, same_bits
from tests.operations.runs import TABLE, run_beside, run_table

KINDS = [kind for kind in LOOPS if kind.__module__.startswith("mhmoe_np.")]


class Pair(NamedTuple):
    x: Any
    y: Any


class Counts(NamedTuple):
    done: Any
    pair: Any  # a named tuple in a region


@tasks_of(Counts, exact)
def _count(i: int, a: Any) -> None:
    """Task i is i times as long as task 1."""
    for _ in range(i):
        a.pair.x[i] += a.pair.y
    a.done[i] += 1


@pytest.mark.parametrize("macs", [0, 1 << 30], ids=["one thread", "all threads"])
@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 100])
def test_every_task_is_done_once(tasks: int, macs: int) -> None:
    region = Counts(np.zeros(tasks, np.int64), Pair(np.zeros(tasks), 0.5))
    run(region, tasks, macs=macs)
    np.testing.assert_array_equal(region.done, 1)
    np.testing.assert_array_equal(region.pair.x, np.arange(tasks) * 0.5)


class Entered(NamedTuple):
    """The kinds of regions that were shared out."""

    kinds: set[type]
    with_packed_weights: set[str]


def shared_out_instead(kind: type, entered: Entered) -> Loops:
    """A kind's loops, of which both share out; entering is noted down."""

    def shared_out(workers: int, counters: Any, tasks: int, *fields: Any) -> None:
        entered.kinds.add(kind)
        if any(isinstance(field, Packed) for field in fields):
            entered.with_packed_weights.add(kind.__name__)
        loops.shared_out(workers, counters, tasks, *fields)

    def in_turn(tasks: int, *fields: Any) -> None:
        workers = numba.get_num_threads()
        shared_out(workers, np.zeros(workers * COUNTER_STRIDE, np.int64), tasks, *fields)

    loops = LOOPS[kind]
    return Loops(in_turn, shared_out)


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[Entered]:
    """However small, every region is shared out; the kinds that were, so far."""
    entered = Entered(set(), set())
    for kind in KINDS:
        monkeypatch.setitem(LOOPS, kind, shared_out_instead(kind, entered))
    threads = numba.get_num_threads()
    yield entered
    numba.set_num_threads(threads)


def test_every_region_gives_the_same_bits_on_one_thread_on_two_and_in_turn(
    request: pytest.FixtureRequest,
) -> None:
    """In float32: float64 is the same source, and generation has regions for this type alone."""
    expected = run_table(NUMBA, np.float32, seed=49)  # the small ones in turn
    beside = run_beside(NUMBA, np.float32, seed=49)
    entered = request.getfixturevalue("shared_out")
    for count in range(1, min(3, numba.config.NUMBA_NUM_THREADS + 1)):
        numba.set_num_threads(count)
        actual = run_table(NUMBA, np.float32, seed=49)
        assert set(actual) == TABLE
        for name in expected:
            same_bits(actual[name], expected[name])
        actual = run_beside(NUMBA, np.float32, seed=49)
        for name in beside:
            same_bits(actual[name], beside[name])
    assert entered == (set(KINDS), {"ExpertsForward", "PackedTiles"})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_loop_shows_the_lines_of_its_task(kind: Any) -> None:
    """Numba reads them when it keeps the loop, and since Python 3.12 fails on what is not Python."""
    for loop in LOOPS[kind]:
        task = loop.py_func.__globals__["TASK"].py_func
        assert inspect.getsource(loop.py_func) == inspect.getsource(task)
