"""Sorting the router's choices by expert."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.operations import dumb
from tests.operations.cases import (
    ALL_CHOICES,
    BACKENDS,
    LENGTHS,
    LOADS,
    NUMBA,
    NUMPY,
    SEEDS,
    TINY,
    Inputs,
    agree,
    always,
    choices,
    of_each_backend,
    quick,
    unchanged,
)


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


@always([{"M": 40, "choice": c, "load": "even", "limit": 3, "seed": 12} for c in ALL_CHOICES])
@always([{"M": 40, "choice": (5, 3), "load": "one", "limit": n, "seed": 13} for n in (1, 39, 40)])
@given(
    M=LENGTHS,
    choice=choices(),
    load=LOADS,
    limit=st.one_of(st.none(), st.integers(1, 60)),
    seed=SEEDS,
)
@quick(60)
def test_dispatch_agrees(
    M: int, choice: tuple[int, int], load: str, limit: int | None, seed: int
) -> None:
    E, K = choice
    expert = Inputs(seed, float).experts(M, E, K, load)
    with unchanged(expert):
        expected = NUMPY.dispatch(expert, experts=E, capacity=limit)
        actual = NUMBA.dispatch(expert, experts=E, capacity=limit)
    agree(actual, expected)


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
    route, slot, start = BACKENDS[name].dispatch(expert, experts=E, capacity=capacity)
    assert (slot.ravel()[route] == np.arange(len(route))).all()
    kept = np.flatnonzero(slot.ravel() >= 0)
    assert (route[slot.ravel()[kept]] == kept).all()
    assert len(kept) == len(route)
    # Each segment holds its own expert's choices: all of them, or as many as the capacity allows.
    segment = np.repeat(np.arange(E), np.diff(start))
    assert (expert.ravel()[route] == segment).all()
    asked = np.bincount(expert.ravel(), minlength=E)
    assert (np.diff(start) == np.minimum(asked, M if capacity is None else capacity)).all()
