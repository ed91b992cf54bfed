"""Memory of the device, and the two doors to the host's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.operations.cuda.graphs import ALIGNMENT_BYTES, Repeated
from mhmoe_np.operations.packing import FormatName, PackedMatrices, code_shape
from mhmoe_np.operations.table import Activation, Branch, Device
from mhmoe_np.operations.workspace import Workspace
from mhmoe_np.settings.run import Matmul

SLAB_BYTES = 64 << 20


class Memory:
    """See `Operations`: memory. Every group of operations stands on it.

    All work goes through one stream, which all backends of the process share. Packed weights lie as in
    files.

    Attributes:
        matmul: how float32 products are computed.
        compute_capability: of the device, as 90 for 9.0.
    """

    def __init__(self, *, keep_buffers: bool, matmul: Matmul) -> None:
        self.matmul = matmul
        self.compute_capability = int(cupy.cuda.Device().compute_capability)
        self._stream = _stream().use()
        self._workspace = (
            Workspace(_allocated, _array_in, alignment=ALIGNMENT_BYTES, slab_bytes=SLAB_BYTES)
            if keep_buffers
            else None
        )

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.empty`."""
        if self._workspace is None:
            return _allocated(shape, dtype)
        return self._workspace.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Operations.zeros`."""
        array = _allocated(shape, dtype)
        array[...] = 0
        return array

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        """See `Operations.empty_packed`: the layout is that of files."""
        code = _allocated((experts, *code_shape(outputs, inputs, format)), np.uint8)
        return PackedMatrices(code, outputs, inputs, format)

    def scope(self) -> AbstractContextManager[None]:
        """See `Operations.scope`."""
        return nullcontext() if self._workspace is None else self._workspace.scope()

    def buffer_bytes(self) -> int:
        """See `Operations.buffer_bytes`."""
        return 0 if self._workspace is None else self._workspace.used_bytes

    def device(self) -> Device:
        """See `Operations.device`."""
        runtime = cupy.cuda.runtime
        version = runtime.driverGetVersion()
        free, total = runtime.memGetInfo()
        return Device(
            runtime.getDeviceProperties(0)["name"].decode(),
            f"{version // 1000}.{version % 1000 // 10}",
            f"CuPy {cupy.__version__}",
            free + cupy.get_default_memory_pool().free_bytes(),  # what CuPy keeps for later arrays
            total,
        )

    def blas(self) -> None:
        """See `Operations.blas`."""
        return None

    def repeated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """See `Operations.repeated`: recorded as a CUDA graph, where there is a workspace."""
        return Repeated(work, self._stream, self._workspace, _allocated)

    def joined_step(self, branches: Sequence[Branch], *, activation: Activation, eps: float) -> None:
        """See `Operations.joined_step`: a graph of the operations costs one launch as well."""
        return None

    def to_device(self, array: NDArray[Any]) -> Any:
        """See `Operations.to_device`: a copy that stays."""
        copy = _allocated(array.shape, array.dtype)
        copy.set(np.ascontiguousarray(array))
        return copy

    def to_host(self, array: Any) -> NDArray[Any]:
        """See `Operations.to_host`."""
        host: NDArray[Any] = array.get()
        return host

    def packed_to_device(self, packed: PackedMatrices) -> PackedMatrices:
        """See `Operations.packed_to_device`."""
        return packed._replace(code=self.to_device(packed.code))

    def packed_to_host(self, packed: PackedMatrices) -> PackedMatrices:
        """See `Operations.packed_to_host`."""
        return packed._replace(code=self.to_host(packed.code))


@cache
def _stream() -> Any:
    """The process's one: kernels go to CuPy's current stream, cuBLAS's products and graphs to ours."""
    return cupy.cuda.Stream(non_blocking=True)


def _array_in(slab: Any, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return cupy.ndarray(shape, dtype, memptr=slab.data + start)


def _allocated(shape: int | tuple[int, ...], dtype: DTypeLike = np.uint8) -> Any:
    """Uninitialised memory of the device.

    Raises UserError: there is not so much.
    """
    try:
        return cupy.empty(shape, dtype)
    except cupy.cuda.memory.OutOfMemoryError:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free, total = cupy.cuda.runtime.memGetInfo()
        raise UserError(
            f"--backend cuda: {size / 1e9:,.2f} GB more of the device's memory are needed, and "
            f"{free / 1e9:,.2f} of its {total / 1e9:,.2f} GB are free; make the model or the batch "
            "smaller, or raise training.gradient_accumulation_steps"
        ) from None
