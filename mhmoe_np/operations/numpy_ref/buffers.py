"""Storage: NumPy's own allocator, and no reuse."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.types import FloatArray


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """See `Operations.empty`."""
    return np.empty(shape, dtype)


def buffer_bytes() -> int:
    """See `Operations.buffer_bytes`."""
    return 0


def scope() -> AbstractContextManager[None]:
    """See `Operations.scope`."""
    return nullcontext()


def added(dx: FloatArray, onto: FloatArray | None) -> FloatArray:
    """dx, or `onto` with dx added to it."""
    if onto is None:
        return dx
    onto += dx
    return onto
