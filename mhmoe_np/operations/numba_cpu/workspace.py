"""A workspace that owns its buffers: a steady-state training step allocates nothing large.

A fresh large array costs a page fault per 4 kB every time; a reused one costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT_BYTES = 64
SLAB_BYTES = 32 << 20


class Workspace:
    """A stack of slabs of memory: `empty` takes from the top, leaving a `scope` gives back.

    The same sequence of calls receives the same addresses in every step. An array handed out inside
    a scope must not be used after it.
    """

    def __init__(self) -> None:
        self._slabs: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self._used: list[int] = []  # bytes of each slab that were ever handed out
        self._slab = 0
        self._offset = 0

    @property
    def used_bytes(self) -> int:
        """How much was ever handed out at once; the rest of the slabs takes no memory."""
        return sum(self._used)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An uninitialised C-contiguous array, aligned to 64 bytes."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        while True:
            if self._slab == len(self._slabs):
                self._slabs.append(np.empty(max(SLAB_BYTES, size + ALIGNMENT_BYTES), np.uint8))
                self._used.append(0)
            slab = self._slabs[self._slab]
            start = self._offset + -(slab.ctypes.data + self._offset) % ALIGNMENT_BYTES
            if start + size <= slab.nbytes:
                self._offset = start + size
                self._used[self._slab] = max(self._used[self._slab], self._offset)
                return np.ndarray(shape, dtype, slab.data, start)
            self._slab, self._offset = self._slab + 1, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back at the end whatever was handed out inside."""
        mark = self._slab, self._offset
        try:
            yield
        finally:
            self._slab, self._offset = mark
