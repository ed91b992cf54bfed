"""Phases within one region: each begins when the one before is done, whoever comes when."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.phases import end_phase, new_counters, next_task
from mhmoe_np.operations.numba_cpu.regions import LOOPS, run, tasks_of


class Sums(NamedTuple):
    """Every number of a row is the sum of the whole row above, and its place."""

    row: Any  # int64 [phases + 1, tasks]
    done_by: Any  # int64 [workers]
    counters: Any


@task
def _sum(above: Any) -> int:
    total = 0
    for number in above:
        total += number
    return total


@tasks_of(Sums)
def _sums(worker: int, a: Any) -> None:
    tasks = a.row.shape[1]
    for phase in range(len(a.row) - 1):
        done = 0
        i = next_task(a.counters, phase, tasks)
        while i >= 0:
            a.row[phase + 1, i] = (_sum(a.row[phase]) + i) % 1000003
            done += 1
            i = next_task(a.counters, phase, tasks)
        end_phase(a.counters, phase, done, tasks)
        a.done_by[worker] += done


def _expected(phases: int, tasks: int) -> np.ndarray:
    row = np.zeros((phases + 1, tasks), np.int64)
    for phase in range(phases):
        row[phase + 1] = (row[phase].sum() + np.arange(tasks)) % 1000003
    return row


def _made(phases: int, tasks: int, workers: int) -> Sums:
    row = np.full((phases + 1, tasks), -1, np.int64)
    row[0] = 0
    return Sums(row, np.zeros(workers, np.int64), new_counters(phases))


@pytest.mark.parametrize("tasks", [1, 2, 7, 40])
def test_no_phase_begins_before_the_one_above_is_done(tasks: int) -> None:
    load_operations("numba", threads=2)
    for _ in range(20):
        made = _made(200, tasks, workers=2)
        run(made, 2, macs=1 << 30)
        np.testing.assert_array_equal(made.row, _expected(200, tasks))
        assert made.done_by.sum() == 200 * tasks


def test_one_thread_can_be_all_workers_one_after_the_other() -> None:
    load_operations("numba", threads=2)
    made = _made(5, 4, workers=3)
    LOOPS[Sums].in_turn(3, *made)
    np.testing.assert_array_equal(made.row, _expected(5, 4))
    assert made.done_by.tolist() == [20, 0, 0]
