"""A workspace on the device: the same sequence of calls receives the same addresses in every step.

So a step allocates nothing, and what was recorded of one can be played again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT_BYTES = 256  # CUDA's own
SLAB_BYTES = 64 << 20


class Mark(NamedTuple):
    """How far the slabs are handed out."""

    slab: int
    offset: int


class Workspace:
    """A stack of slabs of memory: `empty` takes from the top, leaving a `scope` gives back.

    An array handed out inside a scope must not be used after it. Slabs are kept for good.
    """

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        """allocate: makes a slab of so many bytes."""
        self._allocate = allocate
        self._slabs: list[Any] = []
        self._used: list[int] = []  # bytes of each slab that were ever handed out
        self._slab = self._offset = 0

    @property
    def used_bytes(self) -> int:
        """How much was ever handed out at once."""
        return sum(self._used)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is handed out."""
        return self._slab == self._offset == 0

    def mark(self) -> Mark:
        """How far it is handed out now."""
        return Mark(self._slab, self._offset)

    def hand_out_to(self, mark: Mark) -> None:
        """As if it had been handed out, or given back, up to there."""
        self._slab, self._offset = mark

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An uninitialised C-contiguous array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        while True:
            if self._slab == len(self._slabs):
                self._slabs.append(self._allocate(max(SLAB_BYTES, size)))
                self._used.append(0)
            slab, start = self._slabs[self._slab], self._offset
            if start + size <= slab.nbytes:
                self._offset = -(-(start + size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                self._used[self._slab] = max(self._used[self._slab], start + size)
                return cupy.ndarray(shape, dtype, memptr=slab.data + start)
            self._slab, self._offset = self._slab + 1, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back at the end whatever was handed out inside."""
        mark = self.mark()
        try:
            yield
        finally:
            self.hand_out_to(mark)
