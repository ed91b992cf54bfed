"""Reading and writing safetensors files without surprises."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.files import write_atomically
from mhmoe_np.storage.reading import check_regular

NUMPYS_OWN = frozenset(
    ("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "F16", "F32", "F64", "C64")
)
"""Types of numbers, by the library's names."""
WANTED = {"uint8": ("U8",), "int8": ("I8",)}
"""What an array of a type is read from; floats from those of any width."""
READ_AS = {
    "U8": np.uint8,
    "I8": np.int8,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
"""Those that are mapped."""
MOST_THREADS = 8  # more do not read memory faster
Result = TypeVar("Result")


def save_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_tensors`, atomically.

    Raises OSError: the disk is full or refuses; `path` is as it was.
    """
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the same tensors give the same bytes.

    metadata: one key and what the header says under it; with more, the library would write them in an
    order that changes from run to run.

    safetensors 0.8.0 writes wrong data, silently, for arrays that are not C-contiguous; so every
    array is made so here, and nothing else in the package calls save_file. A scalar stays one, which
    `ascontiguousarray` would not leave it.

    Raises OSError: the disk is full or refuses.
    """
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    header = dict(metadata or {"format": "np"})
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(contiguous, path, header)
        path.chmod(mode)  # the library lets nobody else read the file
    except SafetensorError as error:
        # The library has its own exception for what the system reports, with the number in its text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors.

    Raises UserError: the file is missing; Damaged: it is not as it was written.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path}: not a readable safetensors file: {error}") from None


def read_into(
    path: Path, targets: Mapping[str, NDArray[Any]], on_progress: OnProgress = unseen
) -> None:
    """Fill each array of `targets` from the tensor of its name, converting the float width.

    on_progress: counts the bytes that were filled.

    Raises UserError: see `map_tensors`; nothing was filled.
    """
    found = map_tensors(path, targets)
    size = sum(target.nbytes for target in targets.values())
    fill(targets, found, counting(on_progress, f"reading {path.name}", size))


def fill(
    targets: Mapping[str, NDArray[Any]],
    sources: Mapping[str, NDArray[Any]],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Copy each array's source into it, converting the float width.

    on_bytes: told how many more bytes were filled, as they are.
    """
    copied = _at_once(lambda name: np.copyto(targets[name], sources[name]), targets)
    for target, _ in zip(targets.values(), copied, strict=True):
        if on_bytes is not None:
            on_bytes(target.nbytes)


def map_tensors(path: Path, wanted: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file as views of its pages, of which none is copied.

    The library would hand out copies. What is written to a view stays in this process. Whoever writes
    into the file meanwhile changes the views; so nothing in the package does.

    wanted: for each tensor an array of its shape and type; floats may have another width in the file,
    and then have it in the view.

    Raises UserError: the file is missing or damaged, or lacks a tensor, has one too many, or one of
    another shape or kind of number.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            missing, unknown = sorted(wanted.keys() - names), sorted(names - wanted.keys())
            if missing:
                raise UserError(f"{path}: lacks tensor {missing[0]!r} that the configuration needs")
            if unknown:
                raise UserError(f"{path}: has tensor {unknown[0]!r} that the configuration lacks")
            for name, like in wanted.items():
                found = file.get_slice(name)
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
                if shape != like.shape:
                    raise UserError(
                        f"{path}: tensor {name!r} has shape {list(shape)}, "
                        f"the configuration says {list(like.shape)}"
                    )
                known = WANTED.get(like.dtype.name, ("F16", "F32", "F64"))
                if dtype not in known:
                    raise UserError(f"{path}: tensor {name!r} is {dtype}; needs {' or '.join(known)}")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path}: not a readable safetensors file: {error}") from None
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            content,
            READ_AS[entry["dtype"]],
            math.prod(entry["shape"]),
            start + entry["data_offsets"][0],
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def _at_once(function: Callable[[str], Result], names: Iterable[str]) -> Iterator[Result]:
    """The function's results in the order of the names, computed by a thread for each core.

    NumPy lets others work while it copies or compares.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, names)


def check_finite(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Refuse tensors that came from `path` if a number of theirs is not finite.

    on_bytes: told how many more bytes were looked at, as they are: mapped ones are read from the disk
    here.

    Raises Damaged: it names the first such tensor.
    """

    def is_finite(name: str) -> bool:
        tensor = tensors[name]
        # The least and the largest are NaN where any number is, and no copy is made.
        return not tensor.size or bool(np.isfinite(tensor.min()) and np.isfinite(tensor.max()))

    for name, finite in zip(tensors, _at_once(is_finite, tensors), strict=True):
        if not finite:
            raise Damaged(f"{path}: tensor {name!r} holds numbers that are not finite")
        if on_bytes is not None:
            on_bytes(tensors[name].nbytes)


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a safetensors file, as it is.

    Raises UserError: the file is missing or damaged, or has a type of number that NumPy lacks.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                # With ml_dtypes, which somebody else may have imported, the library reads some of them.
                if (dtype := file.get_slice(name).get_dtype()) not in NUMPYS_OWN:
                    raise Damaged(
                        f"{path}: not a readable safetensors file: tensor {name!r} is {dtype}, "
                        "which NumPy lacks"
                    )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: not a readable safetensors file: {error}") from None
