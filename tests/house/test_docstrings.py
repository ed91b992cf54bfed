"""Docstrings say what a reader needs: shapes, types, errors, source and cost, each in its section."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from latex2mathml.converter import convert

from mhmoe_np.audit.entries import equations_of
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.door import axes_of, sections_of
from mhmoe_np.operations.numpy_ref import memory
from mhmoe_np.operations.table import Operations
from tests.house.ledger import section

PACKAGE = Path(__file__).parents[2] / "mhmoe_np"
FORMULAS = "layers", "model", "costs", "training/schedule.py"  # where functions follow a source
ARRAYS = "layers", "model"  # and where they take arrays

OPERATIONS = {
    name: sections_of(operation.__doc__ or "")
    for name, operation in vars(Operations).items()
    if not name.startswith("_") and callable(operation) and not hasattr(memory, name)
}


def functions_in(rooms: tuple[str, ...], *, methods: bool) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every public function of these rooms, with its place; methods as well where asked for."""
    for path in sorted(PACKAGE.rglob("*.py")):
        shown = path.relative_to(PACKAGE).as_posix()
        if not shown.startswith(rooms):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            inside, prefix = [node], ""
            if isinstance(node, ast.ClassDef):
                inside, prefix = node.body if methods else [], f"{node.name}."
            for child in inside:
                if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                    yield f"{shown}: {prefix}{child.name}", child


def test_every_function_that_follows_a_source_says_which() -> None:
    functions = list(functions_in(FORMULAS, methods=False))
    assert len(functions) > 40
    for place, function in functions:
        source = section(ast.get_docstring(function) or "", "Source")
        assert source is not None, place
        assert re.search(r"\[\w", source), f"{place}: Source cites nothing"


def test_every_function_of_arrays_says_their_shapes() -> None:
    for place, function in functions_in(ARRAYS, methods=True):
        given = [*function.args.args, *function.args.kwonlyargs]
        named = {argument.arg for argument in given if axes_of(argument.arg) is not None}
        annotation = ast.unparse(function.returns) if function.returns else ""
        returned = re.search("(Float|Int|Bool)Array", annotation)
        if axes_of(function.name) is not None or not (named or returned):
            continue
        shapes = section(ast.get_docstring(function) or "", "Shapes")
        assert shapes is not None, place
        before, arrow, after = shapes.partition("->")
        words = set(re.findall(r"\w+", before))
        assert named <= words, f"{place}: Shapes does not name {named - words}"
        assert not returned or (arrow and after), f"{place}: Shapes does not say what is returned"


# ---- the table of operations ----------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_its_sections(operation: str) -> None:
    assert {"Equation", "Shapes", "Dtypes", "Source", "Cost"} <= OPERATIONS[operation].keys()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_equations_of_every_operation_can_be_typeset(operation: str) -> None:
    equations = equations_of(OPERATIONS[operation]["Equation"])
    assert equations
    for latex in equations:
        assert "\\" not in convert(latex), latex  # what it does not know it leaves as it is


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cost_of_the_way_back_is_said(operation: str) -> None:
    """By an operation of its own, or in words beside the cost of the way there."""
    if f"{operation}_backward" in OPERATIONS or f"{operation}_and_gradient" in OPERATIONS:
        return
    if operation.endswith(("_backward", "_and_gradient")):
        return
    assert re.search("backward|gradient", OPERATIONS[operation]["Cost"], re.IGNORECASE)


def raised_by() -> dict[str, set[str]]:
    """What each function of `numpy_ref` raises, itself or through those that it calls."""
    errors: dict[str, set[str]] = {}
    calls: dict[str, set[str]] = {}
    folder = Path(numpy_ref.__file__).parent
    for path in (*folder.glob("*.py"), folder.parent / "packing.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                inside = list(ast.walk(node))
                errors[node.name] = {
                    ast.unparse(part.exc.func)
                    for part in inside
                    if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call)
                }
                calls[node.name] = {
                    part.func.id
                    for part in inside
                    if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
                }
    for _ in errors:  # as many rounds as the longest chain of calls could have
        for name, called in calls.items():
            errors[name] |= {error for other in called for error in errors.get(other, ())}
    return errors


def test_every_operation_that_raises_says_what() -> None:
    raised = raised_by()
    assert "TypeError" in raised["linear_backward"]
    for operation, sections in OPERATIONS.items():
        said = set(re.findall(r"(\w+Error):", sections.get("Raises", "")))
        assert said == raised[operation], operation
