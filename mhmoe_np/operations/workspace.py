"""A workspace that owns its buffers: a steady-state training step allocates nothing large.

The same sequence of calls receives the same addresses in every step. So on the host a large array costs
no page faults, one for every 4 kB of a fresh one, and on a device what was recorded of a step can be
played again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike


class Mark(NamedTuple):
    """How far the slabs are handed out."""

    slab: int
    offset: int


class Workspace:
    """A stack of slabs of memory: `empty` takes from the top, leaving a `scope` gives back.

    An array handed out inside a scope must not be used after it. Slabs are kept for good.
    """

    def __init__(
        self,
        allocate: Callable[[int], Any],
        view: Callable[[Any, int, tuple[int, ...], np.dtype[Any]], Any],
        *,
        alignment: int,
        slab_bytes: int,
    ) -> None:
        """Where its memory comes from.

        allocate: makes a slab of so many bytes, at a multiple of `alignment`, with that as `nbytes`.
        view: the C-contiguous array in a slab from a byte on, of a shape and a dtype.
        alignment: bytes, of every array.
        slab_bytes: the least that a slab has.
        """
        self._allocate, self._view = allocate, view
        self._alignment, self._slab_bytes = alignment, slab_bytes
        self._slabs: list[Any] = []
        self._used: list[int] = []  # bytes of each slab that were ever handed out
        self._slab = self._offset = 0

    @property
    def used_bytes(self) -> int:
        """How much was ever handed out at once; on the host the rest of the slabs takes no memory."""
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
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        while True:
            if self._slab == len(self._slabs):
                self._slabs.append(self._allocate(max(self._slab_bytes, size)))
                self._used.append(0)
            slab = self._slabs[self._slab]
            start = -(-self._offset // self._alignment) * self._alignment
            if start + size <= slab.nbytes:
                self._offset = start + size
                self._used[self._slab] = max(self._used[self._slab], self._offset)
                return self._view(slab, start, shape, dtype)
            self._slab, self._offset = self._slab + 1, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back at the end whatever was handed out inside."""
        mark = self.mark()
        try:
            yield
        finally:
            self.hand_out_to(mark)
