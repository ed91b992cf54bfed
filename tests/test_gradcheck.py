"""The gradient checks pass, and would not if a gradient were wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mhmoe_np.gradcheck import check_all, check_model, check_operations
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName, Operations
from tests.conftest import Run


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


def test_the_command_prints_a_list_of_errors_and_bounds(mhmoe: Run) -> None:
    checks = json.loads(mhmoe("gradcheck", "--json", "--backend", "numpy").stdout)
    assert all(set(check) == {"name", "max_rel_error", "bound"} for check in checks)
    assert all(check["max_rel_error"] <= check["bound"] <= 1e-6 for check in checks)
