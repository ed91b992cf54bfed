"""A GGUF file, llama.cpp's format: its keys with their values, and its tensors, not yet read.

PyPI's `gguf`, llama.cpp's own, takes the file apart and dequantises. Departs in one point: the library
reads on where the file ends, for ever if a damaged length says so; here that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.storage.reading import check_regular
from mhmoe_np.types import FloatArray

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K", "TQ1_0", "TQ2_0")
# Strings, numbers and lengths before the tensors: the largest vocabularies make two million. A damaged
# length must not turn the rest of the file into a list.
MOST_PARTS = 1 << 22


class GgufTensor(NamedTuple):
    """A tensor that has not been read yet."""

    name: str
    shape: tuple[int, ...]  # in our order: the axis that varies fastest is the last
    stored: NDArray[Any]  # mapped: floats of that shape, or rows of packed bytes
    dequantise: Callable[[NDArray[Any]], FloatArray]

    def read(self) -> FloatArray:
        """Its values, as float32."""
        with np.errstate(all="ignore"):  # damaged scales; `fill` looks at what comes of them
            return self.dequantise(np.ascontiguousarray(self.stored)).reshape(self.shape)

    def part(self, index: int) -> GgufTensor:
        """One of the tensors that are stacked in it along its first axis."""
        return self._replace(
            name=f"{self.name}[{index}]", shape=self.shape[1:], stored=self.stored[index]
        )


class GgufFile(NamedTuple):
    """A file's keys with their values, strings, numbers or lists, and its tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


def gguf_library() -> ModuleType:
    """PyPI's `gguf`.

    Raises UserError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError(
            f"GGUF files are read and written by a library that is absent ({error.name}); "
            "pip install 'mhmoe-np[gguf]'"
        ) from None
    return gguf


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of version 2 or 3; its tensors are mapped, not read.

    Raises UserError: it is missing, damaged, of another byte order, or has a tensor of a type that is
    not dequantised here; or `gguf` is not installed.
    """
    check_regular(path)
    gguf = gguf_library()
    try:
        with np.errstate(all="raise"):  # a damaged offset overflows
            reader = _reader(gguf, path)
            values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # The library raises whatever it stumbles over.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(
            f"{path}: not a readable GGUF file: {reason}; download or convert it again"
        ) from None
    if reader.byte_order != "I":
        raise UserError(
            f"{path}: is in the byte order of other machines; turn it round with gguf-convert-endian"
        )
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in READABLE:
            raise UserError(
                f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}; only "
                f"{', '.join(READABLE)} are read: write the model as one of them (llama-quantize)"
            )
        shape = tuple(reversed(tensor.shape.tolist()))
        tensors[tensor.name] = GgufTensor(
            tensor.name, shape, tensor.data, partial(gguf.dequantize, qtype=tensor.tensor_type)
        )
    return GgufFile(values, tensors)


def _reader(gguf: ModuleType, path: Path) -> Any:
    """The library's reader, which looks at the length of the file."""

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        data: Any
        parts = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            if self.parts == 0:
                self.data = self.data.view(np.ndarray)  # each piece of a memmap costs ten times as much
            self.parts += 1
            if self.parts > MOST_PARTS:
                raise ValueError(f"more than {MOST_PARTS:,} values before the tensors")
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,}, a part of it at {end:,}")
            return super()._get(offset, dtype, count, *order, **named)

    return Reader(path)
