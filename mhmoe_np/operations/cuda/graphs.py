"""Work that is recorded once and played again: a training step, a step of decoding.

A launch costs the host some microseconds, a graph of hundreds of them costs about one launch. Recording
needs what a step here is: kernels, copies on the device and cuBLAS on one stream, in memory whose
addresses come out the same each time, with every number that changes in the device's memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from mhmoe_np.operations.workspace import Mark, Workspace

ALIGNMENT_BYTES = 256  # CUDA's own
Allocate = Callable[[int], Any]


class Inputs:
    """Arrays of fixed shapes that come from the host: one copy takes them all to one place.

    Attributes:
        arrays: where they are on the device.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]], stream: Any, allocate: Allocate) -> None:
        """Room for arrays like these."""
        self._stream = stream
        ends = np.cumsum([-(-a.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for a in arrays])
        self._starts, size = [0, *ends[:-1].tolist()], int(ends[-1])
        # Page-locked, so that the copy does not keep the host.
        self._host = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
        self._device = allocate(size)
        self.arrays = [
            cupy.ndarray(a.shape, a.dtype, memptr=self._device.data + start)
            for a, start in zip(arrays, self._starts, strict=True)
        ]
        self._taken = cupy.cuda.Event(disable_timing=True)

    def take(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Copy these to the device, after all that it was given to do before."""
        if not self._taken.done:  # The last copy still reads what is about to be overwritten.
            self._taken.synchronize()
        for array, start in zip(arrays, self._starts, strict=True):
            self._host[start : start + array.nbytes] = (
                np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )
        self._device.set(self._host, stream=self._stream)
        self._taken.record(self._stream)


class _Call:
    """Calls with one `fixed` and arrays of one shape each."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.made = False  # once, so that kernels are compiled and memory is there
        self.graph: Any = None
        self.result: Any = None
        self.mark: Mark | None = None


class Repeated:
    """See `Operations.repeated`. The second call of a kind is recorded, later ones are played.

    Without a workspace, or while something of it is handed out, each call is made anew, with the same
    bits.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        stream: Any,
        workspace: Workspace | None,
        allocate: Allocate,
    ) -> None:
        self._work, self._stream, self._allocate = work, stream, allocate
        self._workspace = workspace
        self._calls: dict[Hashable, _Call] = {}

    def __call__(self, fixed: Hashable, *arrays: NDArray[Any]) -> Any:
        """work(fixed, *arrays), these on the device."""
        key = fixed, *((a.shape, a.dtype.str) for a in arrays)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = _Call(Inputs(arrays, self._stream, self._allocate))
        call.inputs.take(arrays)
        workspace = self._workspace
        if not call.made or workspace is None or not workspace.is_idle:
            call.made = True
            return self._work(fixed, *call.inputs.arrays)
        if call.graph is None:
            self._record(call, fixed, workspace)
        call.graph.launch(stream=self._stream)
        assert call.mark is not None
        workspace.hand_out_to(call.mark)
        return call.result

    def _record(self, call: _Call, fixed: Hashable, workspace: Workspace) -> None:
        with ExitStack() as stack:
            mark = workspace.mark()
            stack.callback(workspace.hand_out_to, mark)
            if gc.isenabled():  # What it frees, as cuBLAS's handles, may wait for the device.
                gc.disable()
                stack.callback(gc.enable)
            self._stream.begin_capture()
            try:
                call.result = self._work(fixed, *call.inputs.arrays)
                call.mark = workspace.mark()
            finally:
                graph = self._stream.end_capture()
            call.graph = graph
