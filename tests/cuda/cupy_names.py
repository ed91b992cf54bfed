"""What the real CuPy offers of what its stand-in does: run apart from tests, which have the stand-in.

python -m tests.cuda.cupy_names    prints it as JSON; needs no GPU
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.emulator import cupy_on_cpu

# For the tests, not for the backend: besides these the stand-in's public names must be CuPy's.
OWN = {"Emulation", "emulation", "enqueue", "POISON", "MAX_GRID"}
IMPORTED = {
    "annotations",
    "ctypes",
    "np",
    "Any",
    "Callable",
    "Counter",
    "SimpleNamespace",
    "perf_counter",
}
IMPORTED |= {"compiled"}


def offered() -> dict[str, Any]:
    """The stand-in's public names."""
    names = set(vars(cupy_on_cpu)) - OWN - IMPORTED
    return {name: getattr(cupy_on_cpu, name) for name in names if not name.startswith("_")}


def instances() -> dict[str, Any]:
    """One of each class, for its attributes; by the path of its class."""
    cuda = cupy_on_cpu.cuda
    array = cupy_on_cpu.empty((2,), np.float32)
    return {
        "ndarray": array,
        "cuda.MemoryPointer": array.data,
        "cuda.Stream": cuda.Stream(),
        "cuda.Event": cuda.Event(),
        "cuda.Device": cuda.Device(),
        "cuda.Graph": cuda.Graph([]),
    }


def missing(mine: Any, theirs: Any, path: str) -> list[str]:
    """The names and parameters at and below `mine` that `theirs` lacks."""
    if isinstance(mine, SimpleNamespace) or inspect.isclass(mine):
        found = [] if isinstance(mine, SimpleNamespace) else _parameters_missing(mine, theirs, path)
        for name, value in vars(mine).items():
            if name.startswith("_"):
                continue
            below = f"{path}.{name}"
            found += missing(value, getattr(theirs, name), below) if hasattr(theirs, name) else [below]
        return found
    return _parameters_missing(mine, theirs, path) if callable(mine) else []


def _parameters_missing(mine: Any, theirs: Any, path: str) -> list[str]:
    known = _parameters(theirs)
    if known is None:
        return []
    return [f"{path}({name})" for name in _parameters(mine) or [] if name not in known]


def _parameters(function: Any) -> list[str] | None:
    """Their names; None where neither a signature nor a docstring tells, or any is taken."""
    try:
        parameters = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        return [
            p.name for p in parameters.values() if p.name != "self" and p.kind is not p.VAR_POSITIONAL
        ]
    except (TypeError, ValueError):
        # Cython writes the signature into the docstring's first line, C types before the names.
        first = re.match(r"[\w.]+\((.*)\)", function.__doc__ or "")
        if first is None or "**" in first[1]:
            return None
        return [part.split("=")[0].split()[-1] for part in first[1].split(",") if part.strip()]


def all_missing(cupy: Any) -> list[str]:
    """What `cupy` lacks of the stand-in."""
    found = []
    for name, value in offered().items():
        found += missing(value, getattr(cupy, name), name) if hasattr(cupy, name) else [name]
    for path, instance in instances().items():
        theirs = cupy
        for part in path.split("."):
            theirs = getattr(theirs, part)
        found += [
            f"{path}.{name}"
            for name in vars(instance)
            if not (
                name.startswith("_") or hasattr(theirs, name) or f".{name} (" in (theirs.__doc__ or "")
            )
        ]
    return sorted(found)


if __name__ == "__main__":
    real = importlib.import_module("cupy")
    assert real is not cupy_on_cpu
    print(
        json.dumps(
            {"version": real.__version__, "offered": sorted(offered()), "missing": all_missing(real)}
        )
    )
