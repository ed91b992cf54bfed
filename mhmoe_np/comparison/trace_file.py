"""Reading traces that another program may have written, and the map of its names to ours."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.storage.reading import check_regular, read_json
from mhmoe_np.storage.tensors import read_tensors

Trace = dict[str, NDArray[Any]]
"""Tensors by name: float32, float64 or integers."""


def read_trace(path: Path) -> Trace:
    """The tensors of a `.safetensors` or `.npz` file.

    Raises UserError: missing, damaged, of another kind, pickled, or a tensor of another type of number.
    """
    tensors = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float64) and tensor.dtype.kind not in "iu":
            raise UserError(
                f"{path}: tensor {name!r} is {tensor.dtype}; write it as float32, float64 or integers"
            )
    return tensors


def _read_safetensors(path: Path) -> Trace:
    size = check_regular(path).st_size
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a trace is a .safetensors or .npz file; rename or convert it")
    check_memory(size, f"{path}: its tensors need", remedy="write fewer tensors")
    return read_tensors(path)


def _read_npz(path: Path) -> Trace:
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        check_memory(size, f"{path}: its tensors need", remedy="write fewer tensors")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # A damaged header raises whatever Python does when it evaluates it.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable .npz file: {reason}") from None


def read_names(path: Path) -> dict[str, str]:
    """The map of another program's names to those of the specification: a JSON object of strings.

    Raises UserError: it is no such object, or two names stand for one.
    """
    names = read_json(path)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path}: must hold a JSON object, their name -> the name in SPECIFICATION.md")
    seen: set[str] = set()
    for name in names.values():
        if name in seen:
            raise UserError(f"{path}: two names stand for {name!r}; keep one of them")
        seen.add(name)
    return names


def renamed(trace: Trace, names: dict[str, str], *, source: Path) -> Trace:
    """The trace under our names.

    Raises UserError: a name stands for one that the trace has as well.
    """
    for theirs, ours in names.items():
        if theirs in trace and ours != theirs and ours in trace and ours not in names:
            raise UserError(
                f"{source}: has tensor {ours!r} beside {theirs!r}, which --names makes of it"
            )
    return {names.get(name, name): tensor for name, tensor in trace.items()}
