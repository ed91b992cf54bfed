"""The gradient checks pass, and would not if a gradient were wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mhmoe_cli import gradcheck_command
from mhmoe_np.audit import gradcheck, operation_checks
from mhmoe_np.audit.derivative import GradientCheck
from mhmoe_np.audit.gradcheck import check_all
from mhmoe_np.audit.model_checks import check_model
from mhmoe_np.audit.operation_checks import check_operations
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.checked import BrokenPromise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BitWeight, Operations
from tests.conftest import Run


def test_every_operation_and_model_is_within_its_bound() -> None:
    """On numba; the definition's gradients are compared with autograd's: `test_trace`."""
    checks = list(check_all(load_operations("numba")))
    assert len(checks) > 60
    assert [check for check in checks if not check.passed] == []


def test_every_backward_of_the_table_is_checked() -> None:
    called: set[str] = set()

    class Noting:
        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(numpy_ref, name)

    noting: Operations = Noting()  # type: ignore[assignment]
    for case in operation_checks.cases(noting, np.random.default_rng(0)):
        operation_checks.check(case, np.random.default_rng(0))
    backwards = {name for name in vars(Operations) if name.endswith(("_backward", "_and_gradient"))}
    assert len(backwards) == 8
    assert backwards <= called


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
    assert not check_model("smoe", ops).passed


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
    rng = np.random.default_rng(0)
    of_it = name.removesuffix("_backward")
    checks = [
        operation_checks.check(case, rng)
        for case in operation_checks.cases(ops, rng)
        if case.name.startswith(of_it)
    ]
    failed = {check.name for check in checks if not check.passed}
    assert len(failed) < len(checks)
    assert failed
    assert all("bitnet" in check for check in failed)
    assert check_model("smoe", ops).passed
    assert not check_model("smoe-ternary", ops).passed


class _WrongEntry:
    """The definition, with one entry of a weight's gradient off."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy_ref, name)

    def linear_backward(self, dy: Any, x: Any, w: Any, dw: Any, db: Any, **options: Any) -> Any:
        dw[2, 3] += 0.5
        return numpy_ref.linear_backward(dy, x, w, dw, db, **options)

    def expert_ffn_backward(self, *arguments: Any, **options: Any) -> Any:
        dgate_up_E2FU = arguments[-3]
        dgate_up_E2FU[3, 2, 5] += 1e-4
        return numpy_ref.expert_ffn_backward(*arguments, **options)


def test_a_failed_check_names_argument_and_entry_and_both_numbers() -> None:
    ops: Operations = _WrongEntry()  # type: ignore[assignment]
    case = operation_checks.linear(ops, np.random.default_rng(0))
    found = operation_checks.check(case, np.random.default_rng(0))
    assert not found.passed
    assert found.entry is not None
    assert (found.name, found.argument, found.entry.place) == ("linear", "w_OI", (2, 3))
    assert found.entry.analytic - found.entry.numeric == pytest.approx(0.5, abs=1e-9)


def test_of_a_model_it_names_the_tensor() -> None:
    class Wrong(_WrongEntry):
        linear_backward = staticmethod(numpy_ref.linear_backward)

    found = check_model("smoe", Wrong())  # type: ignore[arg-type]
    assert not found.passed
    assert found.entry is not None
    # The second layer has the experts; row 2 of the joint matrix is the gate's.
    assert found.argument == "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert found.entry.place == (2, 5)
    assert found.entry.analytic - found.entry.numeric == pytest.approx(1e-4, abs=1e-9)


def test_an_operation_that_breaks_the_tables_promises_is_stopped() -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy_ref, name)

        def rms_norm(self, x_ND: Any, w_D: Any, *, eps: float) -> Any:
            y_ND, rstd_N = numpy_ref.rms_norm(x_ND, w_D, eps=eps)
            return y_ND, rstd_N[:, None]

    ops: Operations = Wrong()  # type: ignore[assignment]
    with pytest.raises(BrokenPromise, match="rms_norm: rstd_N"):
        list(check_all(ops))
    with pytest.raises(BrokenPromise, match="rms_norm: rstd_N"):
        check_model("dense", ops)


def test_the_command_prints_a_list_of_errors_and_bounds(
    mhmoe_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradcheck, "KINDS", ["mh3-shared-sub-norm", "mh2-residual", "mh2-sign"])
    checks = json.loads(mhmoe_here("gradcheck", "--json", "--backend", "numpy").stdout)
    assert len(checks) > 20
    keys = {"name", "max_rel_error", "bound", "argument", "entry"}
    assert all(set(check) == keys for check in checks)
    assert all(check["max_rel_error"] <= check["bound"] <= 1e-6 for check in checks)
    assert all(check["entry"] is None for check in checks)


def test_the_command_says_where_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_and_right(_: Operations) -> Iterator[GradientCheck]:
        for ops in (_WrongEntry(), numpy_ref):
            case = operation_checks.linear(ops, np.random.default_rng(0))  # type: ignore[arg-type]
            yield operation_checks.check(case, np.random.default_rng(0))

    monkeypatch.setattr(gradcheck, "check_all", wrong_and_right)
    run = CliRunner()
    result = run.invoke(gradcheck_command.command, ["--backend", "numpy"])
    assert result.exit_code == 1
    failed, entry, passed = result.stdout.splitlines()
    assert failed.startswith("numpy: linear ")
    assert failed.endswith("<= 1e-07  FAILED")
    assert passed.endswith("ok")
    place, numbers = entry.strip().split(": ")
    assert place == "w_OI[2, 3]"
    numeric, analytic = (float(part.split()[0]) for part in numbers.split(", "))
    assert analytic - numeric == pytest.approx(0.5, abs=1e-8)

    result = run.invoke(gradcheck_command.command, ["--backend", "numpy", "--json"])
    assert result.exit_code == 1
    wrong, right = json.loads(result.stdout)
    assert (wrong["argument"], wrong["entry"]["place"]) == ("w_OI", [2, 3])
    assert wrong["entry"]["analytic"] - wrong["entry"]["numeric"] == pytest.approx(0.5, abs=1e-8)
    assert right["entry"] is None
