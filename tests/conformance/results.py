"""Results as a port writes them, and the script that checks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mhmoe_np.conformance.folder import INDEX, SHIPPED

VECTORS: dict[str, Any] = json.loads((SHIPPED / INDEX).read_text(encoding="utf-8"))["vectors"]
"""What the shipped index says of each vector."""


def named(pattern: str) -> list[str]:
    return [name for name in VECTORS if fnmatch(name, pattern)]


def tensors_of(name: str) -> dict[str, Any]:
    """A vector's file."""
    return load_file(SHIPPED / VECTORS[name]["file"])


def expected(name: str) -> dict[str, Any]:
    """Results and gradients of a vector."""
    specs = VECTORS[name]["tensors"]
    checked = [tensor for tensor in specs if specs[tensor]["role"] in ("result", "gradient")]
    found = tensors_of(name)
    return {tensor: found[tensor] for tensor in checked}


def save(folder: Path, name: str, tensors: dict[str, Any]) -> None:
    """As safetensors."""
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.asarray(array, order="C") for key, array in tensors.items()}, path)


def save_npz(folder: Path, name: str, tensors: dict[str, Any]) -> None:
    path = folder / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **tensors)


def checked(folder: Path, *patterns: str, code: int = 0, script: Path = SHIPPED) -> str:
    """What the script prints of these results, alone in a process that cannot import the package."""
    lines = (
        "import runpy, sys; sys.modules['mhmoe_np'] = None",
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
    )
    command = [sys.executable, "-c", "; ".join(lines), str(script / "check_vectors.py"), str(folder)]
    for pattern in patterns:
        command += ["--only", pattern]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout
