"""What the real CuPy offers of what its stand-in does: run apart from tests, which have the stand-in.

python -m tests.cuda.cupy_names    as JSON: what is missing from CuPy
"""

from __future__ import annotations

import importlib
import inspect
import json
from types import SimpleNamespace
from typing import Any

from tests.cuda.emulator import cupy_on_cpu

# The stand-in's own, for tests.
OWN = {"emulation", "Emulation", "enqueue", "POISON", "MAX_GRID"}
# What kernels and functions of CuPy's own in C hide from `inspect`, found by calling.
UNKNOWN = inspect.Signature([inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)])


def offered() -> dict[str, Any]:
    """The stand-in's public names."""
    return {
        name: value
        for name, value in vars(cupy_on_cpu).items()
        if not name.startswith("_")
        and name not in OWN
        and not inspect.ismodule(value)
        and getattr(value, "__module__", cupy_on_cpu.__name__) in (cupy_on_cpu.__name__, "types")
        and name not in {"SimpleNamespace", "annotations"}
    }


def missing(mine: Any, theirs: Any, path: str) -> list[str]:
    """The names and parameters below `mine` that `theirs` lacks."""
    if isinstance(mine, SimpleNamespace):
        found = []
        for name, value in vars(mine).items():
            if hasattr(theirs, name):
                found += missing(value, getattr(theirs, name), f"{path}.{name}")
            else:
                found.append(f"{path}.{name}")
        return found
    found = _missing_parameters(mine, theirs, path)
    if inspect.isclass(mine):
        for name, value in vars(mine).items():
            if name.startswith("_"):
                continue
            if not hasattr(theirs, name):
                found.append(f"{path}.{name}")
            elif inspect.isfunction(value):
                found += _missing_parameters(value, getattr(theirs, name), f"{path}.{name}")
    return found


def _missing_parameters(mine: Any, theirs: Any, path: str) -> list[str]:
    if not callable(mine):
        return []
    if not callable(theirs):
        return [f"{path} cannot be called"]
    known = _parameters(theirs)
    names = [name for name in _parameters(mine) or () if name not in ("self", "args", "kwargs")]
    if known is None:
        return []
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return [f"{path}({name})" for name in names if name not in known and not free]


def _parameters(function: Any) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


if __name__ == "__main__":
    cupy = importlib.import_module("cupy")
    assert cupy is not cupy_on_cpu
    lacks = [
        entry
        for name, value in offered().items()
        for entry in (missing(value, getattr(cupy, name), name) if hasattr(cupy, name) else [name])
    ]
    print(json.dumps({"version": cupy.__version__, "offered": sorted(offered()), "missing": lacks}))
