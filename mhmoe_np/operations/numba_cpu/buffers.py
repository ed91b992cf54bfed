"""Where the operations' results live: NumPy's allocator, or a workspace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations.packing import FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.workspace import Workspace

ALIGNMENT_BYTES = 64
SLAB_BYTES = 32 << 20


class Buffers:
    """The storage half of the backend; every group of operations stands on it."""

    def __init__(self, *, keep_buffers: bool) -> None:
        self._workspace = (
            Workspace(_slab, _array_in, alignment=ALIGNMENT_BYTES, slab_bytes=SLAB_BYTES)
            if keep_buffers
            else None
        )

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.empty`."""
        if self._workspace is None:
            return np.empty(shape, dtype)
        return self._workspace.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.zeros`."""
        return np.zeros(shape, dtype)

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        """See `Operations.empty_packed`: the layout is that of files."""
        return PackedMatrices(empty_code(experts, outputs, inputs, format), outputs, inputs, format)

    def device(self) -> None:
        """See `Operations.device`."""
        return None

    def repeated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """See `Operations.repeated`: nothing is recorded, and the device is the host."""
        return work

    def to_device(self, array: NDArray[Any]) -> Any:
        """See `Operations.to_device`: the device is the host."""
        return array

    def to_host(self, array: Any) -> NDArray[Any]:
        """See `Operations.to_host`."""
        host: NDArray[Any] = array
        return host

    def packed_to_device(self, packed: PackedMatrices) -> PackedMatrices:
        """See `Operations.packed_to_device`."""
        return packed

    def packed_to_host(self, packed: PackedMatrices) -> PackedMatrices:
        """See `Operations.packed_to_host`."""
        return packed

    def buffer_bytes(self) -> int:
        """See `Operations.buffer_bytes`."""
        return 0 if self._workspace is None else self._workspace.used_bytes

    def scope(self) -> AbstractContextManager[None]:
        """See `Operations.scope`."""
        return nullcontext() if self._workspace is None else self._workspace.scope()


def _slab(size: int) -> NDArray[np.uint8]:
    room = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGNMENT_BYTES
    return room[start : start + size]


def _array_in(
    slab: NDArray[np.uint8], start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    return np.ndarray(shape, dtype, slab.data, start)
