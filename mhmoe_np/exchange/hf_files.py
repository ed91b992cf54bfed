"""The weights of a Hugging Face directory, in one safetensors file or many: read only when asked for.

Nothing in such a file is executed. Pickles (`pytorch_model.bin`) can run anything and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mhmoe_np.checkpoints.checkpoint import WEIGHTS
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.settings.model import shown
from mhmoe_np.storage.reading import check_regular, read_json

INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES: Mapping[str, np.dtype[Any]] = {**FLOATS, "U8": np.dtype("u1")}


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it
    read: Callable[[], NDArray[Any]]  # the file's numbers, mapped


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by its name; the files' headers are read.

    Raises UserError: there are no safetensors files, one is missing or damaged, or the index and the
    files do not agree.
    """
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if (directory / WEIGHTS).is_file():
        return {tensor.name: tensor for tensor in _tensors_of(directory / WEIGHTS)}
    pickle = next((name for name in PICKLES if (directory / name).exists()), None)
    if pickle is not None:
        raise UserError(
            f"{directory}: has {pickle} alone, which can run code when it is read; convert it where "
            "you trust it: transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise UserError(f"{directory}: has neither {WEIGHTS} nor {INDEX}; give a Hugging Face directory")


def _indexed(directory: Path) -> dict[str, StoredTensor]:
    path = directory / INDEX
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{path}: has no table 'weight_map' of tensors and files")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{path}: names {shown(file)}, which is not a file beside it")
        for tensor in _tensors_of(directory / file):
            if files.get(tensor.name) != file:
                raise UserError(
                    f"{directory / file}: has tensor {shown(tensor.name)}, which {INDEX} does not put "
                    "there"
                )
            found[tensor.name] = tensor
    for name, file in files.items():
        if name not in found:
            raise UserError(f"{directory / file}: lacks tensor {shown(name)}, which {INDEX} puts there")
    return found


def _tensors_of(path: Path) -> Iterator[StoredTensor]:
    check_regular(path)
    try:
        with safe_open(path, framework="np"):  # looks at the header and the length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path}: not a readable safetensors file: {error}") from None
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {shown(name)} is {entry['dtype']}; needs {' or '.join(DTYPES)}"
            )
        shape, start = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        yield StoredTensor(name, shape, entry["dtype"], _reader(path, start, shape, entry["dtype"]))


def _reader(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> Callable[[], NDArray[Any]]:
    kind = DTYPES[dtype]
    count = int(np.prod(shape, dtype=np.int64))

    def read() -> NDArray[Any]:
        if count == 0:  # nothing can be mapped
            return np.empty(shape, kind)
        mapped = np.memmap(path, np.uint8, "r", offset=start, shape=(count * kind.itemsize,))
        return mapped.view(kind).reshape(shape)

    return read
