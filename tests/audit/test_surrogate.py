"""The surrogate of a quantised model: the same at its point, smooth around it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit.models import parameters
from mhmoe_np.audit.surrogate import ActingWeight, ChoiceSwitchedError, Surrogate, acting_weights
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BitWeight, Operations


def test_the_quantised_forward_itself_is_flat_between_jumps() -> None:
    # Hence the surrogate: differences of the real thing say nothing about the gradient.
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 8)), rng.standard_normal((5, 8))
    w = BitWeight(np.sign(w), np.ones(5))
    dx = numpy_ref.linear_backward(np.ones((3, 5)), x, w, np.zeros((5, 8)), None)
    inner = np.abs(x) < np.abs(x).max(axis=1, keepdims=True)  # gamma is that of another entry
    step = np.where(inner, 1e-9, 0)
    before, after = numpy_ref.linear(x, w, None), numpy_ref.linear(x + step, w, None)
    np.testing.assert_array_equal(before, after)
    assert abs((dx * inner).sum()) > 1


def test_the_surrogate_is_the_quantised_model_at_its_point() -> None:
    initial = parameters("mh2-ternary-shared-capacity", np.float64)
    ops = load_operations("numpy")
    model = Model.of(initial, ops=ops)
    acting = model._replace(weights=acting_weights(model.weights, initial, initial))
    inputs = np.random.default_rng(1).integers(0, 37, (2, 9))
    expected, _ = forward(model, inputs, None, drop=True, ops=ops)
    surrogate = cast(Operations, Surrogate(ops))
    found, _ = forward(acting, inputs, None, drop=True, ops=surrogate)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("other", [[0, 0, 0, 1], [0, 1, 0, 1]])
def test_rows_that_go_elsewhere_are_not_moved_by_anothers_constants(other: list[int]) -> None:
    # In the first case all rows stand as before, and one of them belongs to the expert before its own.
    ops = load_operations("numpy")
    surrogate, rng = Surrogate(ops), np.random.default_rng(0)
    x, gate = rng.standard_normal((4, 3)), np.ones((4, 1))
    weights = ActingWeight(rng.standard_normal((2, 4, 3))), ActingWeight(rng.standard_normal((2, 3, 2)))

    def run(expert: list[int]) -> Any:
        surrogate.rewind()
        sent = ops.dispatch(np.array(expert)[:, None], experts=2, capacity=None)
        return surrogate.expert_ffn(x, gate, sent, *weights, None, activation="silu", eps=1e-5)[0]

    first = run([0, 0, 1, 1])
    np.testing.assert_array_equal(run([0, 0, 1, 1]), first)
    with pytest.raises(ChoiceSwitchedError):
        run(other)
