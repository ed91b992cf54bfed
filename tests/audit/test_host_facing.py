"""Checks compute on NumPy's arrays whatever the backend's are."""

from __future__ import annotations

import numpy as np
import pytest

from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import pack
from mhmoe_np.operations.table import BackendName, BitWeight, PackedWeight
from tests.strict_backend import strict_operations

NUMPY = load_operations("numpy")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_backend_whose_device_is_the_host_is_left_as_it_is(backend: BackendName) -> None:
    ops = load_operations(backend)
    assert on_host(ops) is ops


def test_arrays_go_to_the_device_and_what_is_changed_there_comes_back() -> None:
    ops, rng = on_host(strict_operations()[0]), np.random.default_rng(0)
    x, w, b = rng.standard_normal((4, 3)), rng.standard_normal((5, 3)), rng.standard_normal(5)
    np.testing.assert_array_equal(ops.linear(x, w, b), NUMPY.linear(x, w, b))
    dy, onto = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    here = [np.ones((5, 3)), np.ones(5), onto.copy()]
    there = [array.copy() for array in here]
    NUMPY.linear_backward(dy, x, w, here[0], here[1], onto_NI=here[2])
    found = ops.linear_backward(dy, x, w, there[0], there[1], onto_NI=there[2])
    assert found is there[2]
    for expected, actual in zip(here, there, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_arrays_inside_of_tuples_go_too() -> None:
    ops, rng = on_host(strict_operations()[0]), np.random.default_rng(0)
    logits = rng.standard_normal((6, 4))
    routing = ops.route(logits, top_k=2, normalise=True)
    sent = ops.dispatch(routing.expert_MK, experts=4, capacity=2)
    for actual, expected in zip(
        sent, NUMPY.dispatch(routing.expert_MK, experts=4, capacity=2), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    x, q = rng.standard_normal((3, 20)), rng.integers(-1, 2, (5, 20)).astype(float)
    packed = PackedWeight(pack(q[None], "ternary-2bit"), np.ones((1, 5)))
    expected = NUMPY.linear(x, BitWeight(q, np.ones(5)), None)
    np.testing.assert_array_equal(ops.linear(x, packed, None), expected)
    np.testing.assert_array_equal(ops.linear(x, BitWeight(q, np.ones(5)), None), expected)
