"""A backend's operations on NumPy's arrays, for checks that compute between one and the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations.packing import FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.table import Operations


def on_host(ops: Operations) -> Operations:
    """The same operations on NumPy's arrays: `ops` themselves where their device is the host."""
    probe = np.zeros(1)
    return ops if ops.to_device(probe) is probe else cast(Operations, HostFacing(ops))


class HostFacing:
    """Operations whose device is the host: each call takes its arrays to `ops` and back.

    What an operation changes in place is changed in the arrays that were given.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self.prefers_packed = ops.prefers_packed

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.empty`."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.zeros`."""
        return np.zeros(shape, dtype)

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        """See `Operations.empty_packed`."""
        return PackedMatrices(empty_code(experts, outputs, inputs, format), outputs, inputs, format)

    def scope(self) -> AbstractContextManager[None]:
        """See `Operations.scope`: nothing is used again."""
        return nullcontext()

    def to_device(self, array: NDArray[Any]) -> Any:
        """See `Operations.to_device`."""
        return array

    def to_host(self, array: Any) -> NDArray[Any]:
        """See `Operations.to_host`."""
        host: NDArray[Any] = array
        return host

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The operation of this name."""
        operation = getattr(self._ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            pairs: list[tuple[Any, Any]] = []
            taken = self._taken(arguments, pairs)
            result = operation(*taken, **self._taken(options, pairs))
            for host, device in pairs:
                if device is not host:
                    host[...] = self._ops.to_host(device)
            return self._brought(result, pairs)

        return call

    def _taken(self, value: Any, pairs: list[tuple[Any, Any]]) -> Any:
        """The value with every array of it on the device; pairs: which became which."""
        if isinstance(value, np.ndarray):
            pairs.append((value, self._ops.to_device(value)))
            return pairs[-1][1]
        if isinstance(value, PackedMatrices):
            packed = self._ops.packed_to_device(value)
            pairs.append((value.code, packed.code))
            return packed
        if isinstance(value, dict):
            return {key: self._taken(part, pairs) for key, part in value.items()}
        if isinstance(value, tuple):
            parts = [self._taken(part, pairs) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def _brought(self, value: Any, pairs: list[tuple[Any, Any]]) -> Any:
        """The result on the host; an array that was given is given back itself."""
        if isinstance(value, tuple):
            parts = [self._brought(part, pairs) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None:
            return None
        given = [host for host, device in pairs if device is value]
        return given[0] if given else self._ops.to_host(value)
