"""Where the operations' results live: NumPy's allocator, or a workspace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.numba_cpu.workspace import Workspace


class Buffers:
    """The storage half of the backend; every group of operations stands on it."""

    def __init__(self, *, keep_buffers: bool) -> None:
        self._workspace = Workspace() if keep_buffers else None

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.empty`."""
        if self._workspace is None:
            return np.empty(shape, dtype)
        return self._workspace.empty(shape, dtype)

    def buffer_bytes(self) -> int:
        """See `Operations.buffer_bytes`."""
        return 0 if self._workspace is None else self._workspace.used_bytes

    def scope(self) -> AbstractContextManager[None]:
        """See `Operations.scope`."""
        return nullcontext() if self._workspace is None else self._workspace.scope()
