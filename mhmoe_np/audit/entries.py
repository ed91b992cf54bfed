"""What the code says of itself: each operation and layer with its equations, source, cost and place.

Read off the docstrings of `operations/table.py` and `layers/` and off the files that define them, so
that there is no second list.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_np.operations.door import promises, sections_of
from mhmoe_np.operations.table import BackendName, Operations

PACKAGE = Path(__file__).parents[1]
FOLDERS: dict[BackendName, str] = {"numpy": "numpy_ref", "numba": "numba_cpu", "cuda": "cuda"}
BACKWARDS = "_backward", "_and_gradient", "_in_place"  # a rotation's backward is a rotation


class Place(NamedTuple):
    """The line of a `def`."""

    path: str  # mhmoe_np/operations/numpy_ref/norm.py
    line: int


class Entry(NamedTuple):
    """One function: what it computes, what it follows, what it costs and where it stands."""

    name: str
    says: str  # the docstring before its sections
    equations: tuple[str, ...]  # LaTeX
    shapes: str
    source: str
    cost: str
    places: dict[str, Place]  # by backend; of a layer one, named `layers`

    def as_dict(self) -> dict[str, Any]:
        """All fields; places as path and line."""
        return self._asdict() | {
            "places": {name: place._asdict() for name, place in self.places.items()}
        }


def operation_entries() -> dict[str, Entry]:
    """Every operation of the table that promises something of its arrays, in its order."""
    places = {backend: _methods(PACKAGE / "operations" / name) for backend, name in FOLDERS.items()}
    return {
        name: _entry(
            name,
            getattr(Operations, name).__doc__ or "",
            {backend: found[name] for backend, found in places.items() if name in found},
        )
        for name in promises()
    }


def layer_entries() -> list[Entry]:
    """Every public function of the layers that follows a source, file by file."""
    return [
        _entry(function.name, docstring, {"layers": _place(path, function)})
        for path in sorted((PACKAGE / "layers").glob("*.py"))
        for function in _functions(ast.parse(path.read_text(encoding="utf-8")))
        if "Source" in sections_of(docstring := ast.get_docstring(function) or "")
        and not function.name.startswith("_")
    ]


def backward_of(name: str) -> str:
    """The operation of the table that goes back through what a gradient check names.

    Raises KeyError: there is none.
    """
    base = name.partition("[")[0]
    for ending in BACKWARDS:
        if base + ending in promises():
            return base + ending
    raise KeyError(f"{name}: the table has no backward of it")


def equations_of(section: str) -> tuple[str, ...]:
    r"""The formulas of a section Equation, which `\\` separates."""
    return tuple(formula for part in re.split(r"\\\\(?:\s|$)", section) if (formula := part.strip()))


def _entry(name: str, docstring: str, places: dict[str, Place]) -> Entry:
    sections = sections_of(docstring)
    return Entry(
        name,
        says=re.split(r"\n *(?:Equation|Shapes|Source) +", docstring, maxsplit=1)[0].strip(),
        equations=equations_of(sections.get("Equation", "")),
        shapes=sections.get("Shapes", ""),
        source=sections.get("Source", ""),
        cost=sections.get("Cost", ""),
        places=places,
    )


def _methods(folder: Path) -> dict[str, Place]:
    """A backend's operations: methods of its classes, or functions where it is a module."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside: list[ast.Module | ast.ClassDef] = [
            node for node in tree.body if isinstance(node, ast.ClassDef)
        ]
        if folder.name == FOLDERS["numpy"]:
            inside = [tree]
        for node in inside:
            for function in _functions(node):
                if function.name in promises():
                    found[function.name] = _place(path, function)
    return found


def _functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            yield child


def _place(path: Path, function: ast.FunctionDef) -> Place:
    return Place(path.relative_to(PACKAGE.parent).as_posix(), function.lineno)
