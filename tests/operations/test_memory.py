"""Allocation, the doors, and buffers that are used again."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import FORMATS, FormatName, code_shape, pack
from mhmoe_np.operations.table import Operations
from tests.operations.cases import (
    BACKENDS,
    DTYPES,
    NUMBA,
    Inputs,
    flat,
    of_each_backend,
    of_each_dtype,
    same_bits,
)
from tests.operations.runs import run_table


def span(array: Any) -> tuple[int, int]:
    first = array.__array_interface__["data"][0]
    return first, first + array.nbytes


@pytest.fixture
def keeping() -> Operations:
    return load_operations("numba", keep_buffers=True)


def all_operations() -> dict[str, Operations]:
    """The backends, and the one that keeps its buffers."""
    return BACKENDS | {"numba, keeping": load_operations("numba", keep_buffers=True)}


of_all = pytest.mark.parametrize("name", all_operations())

# ---- allocation ------------------------------------------------------------------------------


@of_all
@pytest.mark.parametrize("dtype", [*DTYPES, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(7,), (3, 0), (2, 3, 4)])
def test_arrays_have_the_shape_and_dtype_asked_for(name: str, dtype: Any, shape: Any) -> None:
    ops = all_operations()[name]
    for array in (ops.empty(shape, dtype), ops.zeros(shape, dtype)):
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert not ops.zeros(shape, dtype).any()


@of_all
def test_zeros_outlive_the_scope_that_they_were_made_in(name: str) -> None:
    ops = all_operations()[name]
    with ops.scope():
        stays = ops.zeros((100,), np.float64)
        stays[...] = 1
    with ops.scope():
        for _ in range(3):
            ops.empty((100,), np.float64)[...] = 2
        assert not ops.zeros((100,), np.float64).any()
    assert (stays == 1).all()


@of_each_backend
@pytest.mark.parametrize("format", FORMATS)
def test_room_for_packed_matrices_has_the_layout_that_is_packed_into(
    name: str, format: FormatName
) -> None:
    ops, r = BACKENDS[name], Inputs(62, np.float32)
    room = ops.empty_packed(2, 17, 21, format)
    assert (room.outputs, room.inputs, room.format) == (17, 21, format)
    assert ops.packed_to_host(room).code.shape == (2, *code_shape(17, 21, format))
    q = r.bits(format, 2, 17, 21).w
    ops.pack_in_place(q, room)
    np.testing.assert_array_equal(ops.packed_to_host(room).code, pack(q, format).code)


@of_each_backend
def test_what_goes_through_both_doors_is_what_it_was(name: str) -> None:
    ops, r = BACKENDS[name], Inputs(63, np.float32)
    for array in (r(3, 4), np.arange(5), np.array([True, False])):
        same_bits(ops.to_host(ops.to_device(array)), array)
    packed = pack(r.bits("ternary-2bit", 2, 17, 21).w, "ternary-2bit")
    back = ops.packed_to_host(ops.packed_to_device(packed))
    assert back._replace(code=packed.code) == packed
    same_bits(back.code, packed.code)


@of_each_backend
def test_where_the_device_is_the_host_nothing_is_copied(name: str) -> None:
    ops, array = BACKENDS[name], np.zeros(3)
    assert ops.to_device(array) is array
    assert ops.to_host(array) is array


# ---- buffers that are used again -------------------------------------------------------------


def test_results_inside_one_scope_do_not_overlap(keeping: Operations) -> None:
    with keeping.scope():
        results = flat(list(run_table(keeping, np.float64, seed=53).values()))
        for a, b in itertools.pairwise(sorted(span(array) for array in results)):
            assert a[1] <= b[0]


def test_leaving_a_scope_gives_its_memory_to_the_next(keeping: Operations) -> None:
    r = Inputs(54, float)
    x, w = r(33, 5), r(7, 5)
    spans = []
    outside = keeping.linear(x, w, None)
    kept = outside.copy()
    for _ in range(3):
        with keeping.scope():
            spans.append([span(keeping.linear(x, w, None)), span(keeping.empty((9,), np.float32))])
    assert spans[0] == spans[1] == spans[2]
    same_bits(outside, kept)  # handed out before the scopes: never reused by them


def test_an_inner_scope_leaves_the_outer_ones_results_alone(keeping: Operations) -> None:
    with keeping.scope():
        outer = keeping.empty((1000,), np.float64)
        outer[:] = 1
        with keeping.scope():
            inner = keeping.empty((1000,), np.float64)
            inner[:] = 2
            freed = span(inner)
        after = keeping.empty((1000,), np.float64)
        assert span(after) == freed
        after[:] = 3
        assert (outer == 1).all()


def test_a_scope_left_by_an_exception_gives_its_memory_back(keeping: Operations) -> None:
    def fail() -> None:
        with keeping.scope():
            taken.append(span(keeping.empty((100,), np.float64)))
            raise ZeroDivisionError

    taken: list[tuple[int, int]] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert span(keeping.empty((100,), np.float64)) == taken[0]


def test_a_workspace_grows_beyond_one_block(keeping: Operations) -> None:
    # Blocks are of 32 MiB; the third request is larger than any block yet.
    shapes = [(3 << 20,), (3 << 20,), (5 << 20,), (7,)]
    spans = []
    for _ in range(2):
        with keeping.scope():
            arrays = [keeping.empty(shape, np.float64) for shape in shapes]
            assert [array.shape for array in arrays] == shapes
            spans.append([span(array) for array in arrays])
    assert spans[0] == spans[1]
    for a, b in itertools.pairwise(sorted(spans[0])):
        assert a[1] <= b[0]


def test_the_bytes_of_a_workspace_are_the_most_handed_out_at_once(keeping: Operations) -> None:
    assert keeping.buffer_bytes() == 0
    with keeping.scope():
        keeping.empty((1000,), np.float64)
        with keeping.scope():
            keeping.empty((5000,), np.float64)
        keeping.empty((1000,), np.float64)
    # Buffers start at multiples of 64 bytes, so a little may lie between them.
    assert 6000 * 8 <= keeping.buffer_bytes() <= 6000 * 8 + 2 * 64
    assert all(ops.buffer_bytes() == 0 for ops in BACKENDS.values())


@of_each_dtype
def test_without_kept_buffers_results_outlive_a_scope(dtype: Any) -> None:
    r = Inputs(55, dtype)
    x, w = r(33, 5), r(7, 5)
    with NUMBA.scope():
        y = NUMBA.linear(x, w, None)
    kept = y.copy()
    with NUMBA.scope():
        other = NUMBA.linear(-x, w, None)
    assert not np.shares_memory(y, other)
    same_bits(y, kept)
