"""Where the operations' results live: NumPy's allocator, or a workspace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations import numpy_ref
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

    # The device is the host, and packed codes lie as in files: what NumPy's backend does.
    zeros = staticmethod(numpy_ref.zeros)
    empty_packed = staticmethod(numpy_ref.empty_packed)
    to_device = staticmethod(numpy_ref.to_device)
    to_host = staticmethod(numpy_ref.to_host)
    packed_to_device = staticmethod(numpy_ref.packed_to_device)
    packed_to_host = staticmethod(numpy_ref.packed_to_host)

    def buffer_bytes(self) -> int:
        """See `Operations.buffer_bytes`."""
        return 0 if self._workspace is None else self._workspace.used_bytes

    def scope(self) -> AbstractContextManager[None]:
        """See `Operations.scope`."""
        return nullcontext() if self._workspace is None else self._workspace.scope()
