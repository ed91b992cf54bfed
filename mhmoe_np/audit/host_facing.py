"""A backend's operations on NumPy's arrays, for checks that compute between one and the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from mhmoe_np.operations.door import promises
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import PackedMatrices
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
        self.name, self.prefers_packed = ops.name, ops.prefers_packed
        self._host = load_operations("numpy")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The operation of this name.

        What promises nothing of its arrays is memory: NumPy's own, and nothing is used again.
        """
        if name in vars(Operations) and name not in promises():
            memory: Callable[..., Any] = getattr(self._host, name)
            return memory
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
