"""Launching kernels: compiled from a `.cu` file at their first use, with arguments of the right types.

CuPy's arrays are used as memory alone: whatever computes is a kernel of ours or cuBLAS. A kernel takes
C-contiguous arrays, or views by `strided`, and numbers by the parameter's type: a Python int becomes 32
bits, a float the kernel's REAL; a NumPy scalar stays what it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.cuda.sources import options_of, source_of


class Strided(NamedTuple):
    """A view whose strides the kernel is told by other arguments."""

    array: Any


def strided(array: Any) -> Strided:
    """A view as a kernel's argument; its last axis must be contiguous."""
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
        raise ValueError("a kernel takes views with a contiguous last axis alone")
    return Strided(array)


def steps_of(array: Any) -> tuple[int, ...]:
    """A view's strides in elements, without the last axis: what goes with `strided`."""
    return tuple(stride // array.dtype.itemsize for stride in array.strides[:-1])


class Kernels:
    """The kernels of one `.cu` file, for each float type."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    def launch(
        self,
        kernel: str,
        dtype: DTypeLike,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: Any,
    ) -> None:
        """Start a kernel on the current stream; an empty grid starts nothing.

        dtype: what REAL is, float32 or float64.
        """
        if 0 in grid:
            return
        real = np.dtype(dtype)
        function = self._functions.get((kernel, real.name))
        if function is None:
            function = self._functions[kernel, real.name] = self._module(real.name).get_function(kernel)
        function(grid, block, tuple(_argument(a, real) for a in arguments))

    def _module(self, dtype: str) -> Any:
        if dtype not in self._modules:
            self._modules[dtype] = cupy.RawModule(code=source_of(self._name), options=options_of(dtype))
        return self._modules[dtype]


def _argument(value: Any, real: np.dtype[Any]) -> Any:
    if isinstance(value, cupy.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("a kernel takes C-contiguous arrays")
        return value
    if isinstance(value, Strided):
        return value.array
    if isinstance(value, np.generic):
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int32(value)  # raises OverflowError beyond 31 bits
    return real.type(value)


def blocks(items: int, per_block: int) -> int:
    """How many blocks of `per_block` items cover all."""
    return -(-items // per_block)


def threads_of_row(columns: int) -> int:
    """Of a block that has one row: whole warps, up to 256, with four numbers a thread at least."""
    return min(256, blocks(columns, 4 * 32) * 32)
