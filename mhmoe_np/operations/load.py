"""Choosing a backend by name, and its threads."""

from __future__ import annotations

import os

from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName, Operations


def cores() -> int:
    """How many threads can run at once: the cores this process may use, or NUMBA_NUM_THREADS."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("NUMBA_NUM_THREADS") or allowed or 1)


def load_operations(
    name: BackendName, *, threads: int | None = None, keep_buffers: bool = False
) -> Operations:
    """The operations of one backend, on `threads` threads (None: one for each core).

    keep_buffers: numba only; hand results out of a workspace that is reused (see `Workspace`). Leave
    it off unless the caller wraps its work in `scope()` and uses up every result inside.

    Threads are a property of the process: the last call holds for all.

    Numba is imported here and not before: the numpy backend and the help texts do without it.

    Raises UserError: more threads than there are.
    """
    available = cores()
    if threads is not None and not 1 <= threads <= available:
        raise UserError(f"--threads {threads}: this machine offers 1 to {available}")
    if name == "numpy":
        from threadpoolctl import threadpool_limits

        from mhmoe_np.operations import numpy_ref

        threadpool_limits(threads or available, user_api="blas")
        return numpy_ref
    from mhmoe_np.operations.numba_cpu import NumbaOperations

    return NumbaOperations(threads=threads, keep_buffers=keep_buffers)
