"""Sorting the router's choices by expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.table import Dispatch
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import cupy_on_cpu, has_gpu
from tests.operations import dumb
from tests.operations.cases import (
    ALL_CHOICES,
    BACKENDS,
    CUDA,
    FAST,
    LENGTHS,
    LOADS,
    NUMPY,
    SEEDS,
    TINY,
    Inputs,
    agree,
    always,
    choices,
    of_each_backend,
    of_each_fast_backend,
    of_the_device,
    quick,
    unchanged,
)


def kept(sent: Dispatch) -> Dispatch:
    """The rows that carry a choice: where nobody waits for their number there is room for more."""
    return sent._replace(route_R=sent.route_R[: sent.start_Z[-1]])


@given(
    M=TINY,
    E=TINY,
    K=TINY,
    load=LOADS,
    capacity=st.one_of(st.none(), st.integers(1, 7)),
    seed=SEEDS,
)
@quick(150)
def test_dispatch_serves_a_queue_for_each_expert(
    M: int, E: int, K: int, load: str, capacity: int | None, seed: int
) -> None:
    # [spec 4 capacity]
    expert = Inputs(seed, float).experts(M, E, min(K, E), load)
    actual = NUMPY.dispatch(expert, experts=E, capacity=capacity)
    expected = dumb.dispatch(expert.tolist(), E, capacity)
    assert tuple(part.tolist() for part in actual) == expected


@of_each_fast_backend
@always([{"M": 40, "choice": c, "load": "even", "limit": 3, "seed": 12} for c in ALL_CHOICES])
@always([{"M": 40, "choice": (5, 3), "load": "one", "limit": n, "seed": 13} for n in (1, 39, 40)])
@always([{"M": n, "choice": (5, 2), "load": "half", "limit": 30, "seed": 14} for n in (128, 129)])
@given(
    M=LENGTHS,
    choice=choices(),
    load=LOADS,
    limit=st.one_of(st.none(), st.integers(1, 60)),
    seed=SEEDS,
)
@quick(60)
def test_dispatch_agrees(
    name: str, M: int, choice: tuple[int, int], load: str, limit: int | None, seed: int
) -> None:
    E, K = choice
    expert = Inputs(seed, float).experts(M, E, K, load)
    with unchanged(expert):
        expected = NUMPY.dispatch(expert, experts=E, capacity=limit)
        actual = FAST[name].dispatch(expert, experts=E, capacity=limit)
    agree(kept(actual), expected)


@of_each_backend
@given(
    M=st.integers(1, 80),
    E=st.integers(1, 9),
    K=st.integers(1, 9),
    load=LOADS,
    capacity=st.one_of(st.none(), st.integers(1, 90)),
    seed=SEEDS,
)
@quick(50)
def test_slot_and_route_of_a_dispatch_are_inverse(
    name: str, M: int, E: int, K: int, load: str, capacity: int | None, seed: int
) -> None:
    K = min(K, E)
    expert = Inputs(seed, float).experts(M, E, K, load)
    route, slot, start = kept(BACKENDS[name].dispatch(expert, experts=E, capacity=capacity))
    assert (slot.ravel()[route] == np.arange(len(route))).all()
    served = np.flatnonzero(slot.ravel() >= 0)
    assert (route[slot.ravel()[served]] == served).all()
    assert len(served) == len(route)
    # Each segment holds its own expert's choices: all of them, or as many as the capacity allows.
    segment = np.repeat(np.arange(E), np.diff(start))
    assert (expert.ravel()[route] == segment).all()
    asked = np.bincount(expert.ravel(), minlength=E)
    assert (np.diff(start) == np.minimum(asked, M if capacity is None else capacity)).all()


# ---- the GPU: any number of experts and segments, and no waiting -----------------------------


@of_the_device
@pytest.mark.parametrize(
    ("M", "E", "K", "load"),
    [(3000, 7, 3, "even"), (9000, 2, 1, "one"), (70, 1100, 2, "even"), (5, 2100, 5, "half")],
)
@pytest.mark.parametrize("capacity", [None, 11])
def test_many_segments_and_many_experts_are_sorted_alike(
    M: int, E: int, K: int, load: str, capacity: int | None
) -> None:
    expert = Inputs(66, float).experts(M, E, K, load)
    actual = CUDA.dispatch(expert, experts=E, capacity=capacity)
    agree(kept(actual), NUMPY.dispatch(expert, experts=E, capacity=capacity))


@of_the_device
@given(M=LENGTHS, choice=choices(), load=LOADS, capacity=st.integers(1, 60), seed=SEEDS)
@quick(20)
def test_rows_beyond_the_kept_ones_carry_no_choice(
    M: int, choice: tuple[int, int], load: str, capacity: int, seed: int
) -> None:
    E, K = choice
    sent = CUDA.dispatch(Inputs(seed, float).experts(M, E, K, load), experts=E, capacity=capacity)
    assert len(sent.route_R) == min(M * K, E * capacity)
    assert (sent.route_R[sent.start_Z[-1] :] == -1).all()


@of_the_device
def test_rows_beyond_the_kept_ones_are_written_though_their_memory_was_used_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cupy_on_cpu, "POISON", 0)  # emulated, it is -1 otherwise
    ops = cuda_operations(keep_buffers=True)
    for capacity in (None, 2):
        with ops.scope():
            expert = ops.to_device(Inputs(68, float).experts(40, 30, 2, "half"))
            sent = ops.dispatch(expert, experts=30, capacity=capacity)
            route, _, start = (ops.to_host(part) for part in sent)
    assert (len(route), int(start[-1])) == (60, 30)
    assert (route[:30] >= 0).all()
    assert (route[30:] == -1).all()


@of_the_device
@pytest.mark.skipif(has_gpu(), reason="only the stand-in for CuPy counts")
def test_launches_do_not_grow_with_the_experts_and_nobody_waits() -> None:
    ops, counts = cuda_operations(), []
    for E in (2, 40, 300):
        expert = ops.to_device(Inputs(67, float).experts(600, E, 2, "even"))
        cupy_on_cpu.emulation.clear()
        ops.dispatch(expert, experts=E, capacity=9)
        assert cupy_on_cpu.emulation.waits == 0
        counts.append(dict(cupy_on_cpu.emulation.launches))
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0].values()) == 3
