"""The gradient checks pass, and would not if a gradient were wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mhmoe_np.audit.gradcheck import check_all, check_model, check_operations
from mhmoe_np.audit.surrogate import Surrogate, acting_weights
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName, BitWeight, Operations
from mhmoe_np.settings.model import ModelConfig
from tests.conftest import Run
from tests.kinds import DEFAULT_SEED
from tests.kinds import settings as tiny


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_every_operation_and_model_is_within_its_bound(backend: BackendName) -> None:
    checks = list(check_all(load_operations(backend)))
    assert len(checks) > 25
    assert [check for check in checks if not check.passed] == []


class _Wrong:
    """The definition, with one operation's result off by a thousandth."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        operation = getattr(numpy_ref, name)
        if name != self._name:
            return operation

        def wrong(*args: Any, **kwargs: Any) -> Any:
            result = operation(*args, **kwargs)
            first, *rest = result if isinstance(result, tuple) else (result,)
            return (first * 1.001, *rest) if isinstance(result, tuple) else first * 1.001

        return wrong


def _with_wrong(name: str) -> Operations:
    return _Wrong(name)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name", ["linear_backward", "rms_norm_backward", "route_backward", "expert_ffn_backward"]
)
def test_a_gradient_off_by_a_thousandth_is_found(name: str) -> None:
    ops = _with_wrong(name)
    assert not all(check.passed for check in check_operations(ops))
    settings = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    assert not check_model("wrong", settings, ops).passed


class _WrongWhereQuantised(_Wrong):
    """The definition, its backwards off by a thousandth for quantised weights alone."""

    def __getattr__(self, name: str) -> Any:
        right = getattr(numpy_ref, name)
        wrong = super().__getattr__(name)

        def either(*args: Any, **kwargs: Any) -> Any:
            quantised = any(isinstance(argument, BitWeight) for argument in args)
            return (wrong if quantised else right)(*args, **kwargs)

        return either if name == self._name else right


@pytest.mark.parametrize("name", ["linear_backward", "expert_ffn_backward"])
def test_a_straight_through_gradient_off_by_a_thousandth_is_found(name: str) -> None:
    ops: Operations = _WrongWhereQuantised(name)  # type: ignore[assignment]
    failed = {check.name for check in check_operations(ops) if not check.passed}
    assert failed
    assert all("bitnet" in check for check in failed)
    settings = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    assert check_model("right", settings, ops).passed
    assert not check_model("wrong", {**settings, "quantization": "bitnet_b158"}, ops).passed


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
    config = ModelConfig.model_validate(tiny("mh2-ternary-shared-capacity"))
    parameters = Parameters(config, np.float64)
    initialise(parameters, seed=DEFAULT_SEED)
    ops = load_operations("numpy")
    model = Model.of(parameters, ops=ops)
    acting = model._replace(weights=acting_weights(model.weights, parameters, parameters))
    inputs = np.random.default_rng(1).integers(0, 37, (2, 9))
    expected, _ = forward(model, inputs, None, drop=True, ops=ops)
    surrogate: Operations = Surrogate(ops)  # type: ignore[assignment]
    found, _ = forward(acting, inputs, None, drop=True, ops=surrogate)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_the_command_prints_a_list_of_errors_and_bounds(mhmoe: Run) -> None:
    checks = json.loads(mhmoe("gradcheck", "--json", "--backend", "numpy").stdout)
    assert all(set(check) == {"name", "max_rel_error", "bound"} for check in checks)
    assert all(check["max_rel_error"] <= check["bound"] <= 1e-6 for check in checks)
