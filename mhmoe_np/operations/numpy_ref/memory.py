"""Memory: NumPy's own allocator, no reuse, and a device that is the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations.blas import blas_of
from mhmoe_np.operations.packing import FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.table import Activation, Blas, Branch


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """See `Operations.empty`."""
    return np.empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """See `Operations.zeros`."""
    return np.zeros(shape, dtype)


def empty_packed(experts: int, outputs: int, inputs: int, format: FormatName) -> PackedMatrices:
    """See `Operations.empty_packed`: the layout is that of files."""
    return PackedMatrices(empty_code(experts, outputs, inputs, format), outputs, inputs, format)


def scope() -> AbstractContextManager[None]:
    """See `Operations.scope`."""
    return nullcontext()


def buffer_bytes() -> int:
    """See `Operations.buffer_bytes`."""
    return 0


def device() -> None:
    """See `Operations.device`."""
    return None


def blas() -> Blas:
    """See `Operations.blas`: NumPy's."""
    return blas_of("numpy")


def repeated(work: Callable[..., Any]) -> Callable[..., Any]:
    """See `Operations.repeated`."""
    return work


def joined_step(branches: Sequence[Branch], *, activation: Activation, eps: float) -> None:
    """See `Operations.joined_step`: the definition joins nothing."""
    return None


def to_device(array: NDArray[Any]) -> Any:
    """See `Operations.to_device`."""
    return array


def to_host(array: Any) -> NDArray[Any]:
    """See `Operations.to_host`."""
    host: NDArray[Any] = array
    return host


def packed_to_device(packed: PackedMatrices) -> PackedMatrices:
    """See `Operations.packed_to_device`."""
    return packed


def packed_to_host(packed: PackedMatrices) -> PackedMatrices:
    """See `Operations.packed_to_host`."""
    return packed
