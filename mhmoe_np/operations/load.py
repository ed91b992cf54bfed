"""Choosing a backend by name."""

from __future__ import annotations

from mhmoe_np.operations.table import BackendName, Operations


def load_operations(name: BackendName, *, keep_buffers: bool = False) -> Operations:
    """The operations of one backend.

    keep_buffers: numba only; own a workspace whose buffers are reused (see `Workspace`). Leave it off
    unless every returned array is used up before the workspace is reset.

    Numba is imported here and not before: the numpy backend and the help texts do without it.
    """
    if name == "numpy":
        from mhmoe_np.operations import numpy_ref

        return numpy_ref
    from mhmoe_np.operations.numba_cpu import NumbaOperations

    return NumbaOperations(keep_buffers=keep_buffers)
