"""The index of the vectors: what each is, by the docstrings of the table, its tensors and tolerances.

Nothing is said here that stands elsewhere: equations, shapes and sources come from docstrings.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mhmoe_np.conformance import tolerance, vector
from mhmoe_np.conformance.tolerance import recorded, tolerances
from mhmoe_np.conformance.vector import Outcome, Vector
from mhmoe_np.operations.door import promises, sections_of
from mhmoe_np.operations.table import Operations

SAID = "Shapes", "Dtypes", "Source"  # sections of a docstring that the index repeats


class Known(NamedTuple):
    """A vector with its outcome in float64 by the definition, and how far others may be from it."""

    vector: Vector
    outcome: Outcome
    operations: list[str]  # in the table's order
    tolerances: dict[str, dict[str, float]]

    @classmethod
    def of(cls, vector: Vector, ops: Operations) -> Known:
        """ops: numpy's."""
        outcome, called = recorded(vector, ops)
        return cls(vector, outcome, in_order(called), tolerances(vector, outcome, ops))


def in_order(operations: set[str]) -> list[str]:
    """As the table has them."""
    return [name for name in promises() if name in operations]


def index_of(known: Iterable[Known]) -> str:
    """The index as JSON, a line for each tensor."""
    vectors = list(known)
    operations = in_order({name for each in vectors for name in each.operations})
    functions = {function for each in vectors for function in each.vector.functions}
    index = {
        "version": version("mhmoe-np"),
        "gradients": _prose(vector),
        "tolerance": f"{_prose(tolerance)} Here {tolerance.ROUNDINGS}.",
        "operations": {name: _described(getattr(Operations, name)) for name in operations},
        "functions": {
            _name_of(function): _described(function) for function in sorted(functions, key=_name_of)
        },
        "vectors": {each.vector.name: _entry(each) for each in vectors},
    }
    return _rendered(index, depth=0) + "\n"


def _prose(module: Any) -> str:
    """What a module's docstring says below its first line."""
    return " ".join(inspect.cleandoc(module.__doc__).partition("\n\n")[2].split())


def _described(function: Callable[..., Any]) -> dict[str, str]:
    """A docstring's text and the sections that matter to a port."""
    docstring = inspect.cleandoc(function.__doc__ or "")
    sections = sections_of(docstring)
    text = docstring.partition(f"\n\n{next(iter(sections))}")[0]
    said = {name.lower(): sections[name] for name in SAID if name in sections}
    return {"computes": text, **said}


def _text_of(function: Callable[..., Any]) -> str:
    """A docstring without sections, on one line."""
    return " ".join(inspect.cleandoc(function.__doc__ or "").split())


def _name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _entry(known: Known) -> dict[str, Any]:
    """What the index says of one vector."""
    about = known.vector
    roles = [("argument", about.arguments), ("upstream gradient", about.upstream)]
    entry: dict[str, Any] = {"about": about.about, "computes": _text_of(about.compute)}
    entry |= {"file": f"{about.name}.safetensors"}
    if about.subject == "model":  # its weights are a checkpoint's
        entry |= {"file": f"{about.name}/trace.safetensors", "checkpoint": about.name}
        tokens = {name: about.arguments[name] for name in ("input_ids", "target_ids")}
        roles = [("argument", tokens)]
    roles += [("result", known.outcome.results), ("gradient", known.outcome.gradients)]
    tensors = {
        name: _tensor(array, role) | _tolerance(known, name)
        for role, arrays in roles
        for name, array in arrays.items()
    }
    functions = [_name_of(function) for function in about.functions]
    return {
        **entry,
        "operations": known.operations,
        "functions": functions,
        "options": dict(about.options),
        "tensors": tensors,
    }


def _tensor(array: NDArray[Any], role: str) -> dict[str, Any]:
    return {"role": role, "dtype": str(array.dtype), "shape": list(array.shape)}


def _tolerance(known: Known, name: str) -> dict[str, Any]:
    """Of results and gradients that are not integers."""
    return {"tolerance": known.tolerances[name]} if name in known.tolerances else {}


def _rendered(value: Any, *, depth: int, key: str = "") -> str:
    """JSON, indented down to the parts of a vector or an operation, and to single tensors."""
    if not isinstance(value, dict) or not value or (depth > 2 and key != "tensors"):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    indent = "  " * (depth + 1)
    lines = [
        f"{indent}{json.dumps(name)}: {_rendered(part, depth=depth + 1, key=name)}"
        for name, part in value.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"
