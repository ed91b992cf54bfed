"""A stand-in for CuPy without a GPU: device memory that only kernels may compute with.

It offers the small part of CuPy that the backend uses, under CuPy's own names and rules, and refuses
what CuPy refuses (NumPy arrays in kernels, implicit conversion, waiting or allocating while a graph is
captured) and what would hide a mistake (arithmetic, NumPy functions on device arrays, a kernel's
argument of another type than its parameter). Memory that nobody wrote yet holds NaN, or -1. Kernels run
on the CPU behind `cuda_on_cpu.hpp`. Counted: launches, graphs played, waits of the host, copies to the
device.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.emulator.compiling import compiled

__version__ = "emulated"
POISON = 0xFF  # of memory that nobody wrote: NaN, or -1
MAX_GRID = (2**31 - 1, 65535, 65535)


class Emulation:
    """What tests set, and what is counted."""

    def __init__(self) -> None:
        self.order_seed = 0  # of the threads in every launch: 0 as numbered, 1 reversed, else shuffled
        self.device_bytes = 80 << 30
        self.clear()

    def clear(self) -> None:
        """Count anew."""
        self.launches: Counter[str] = Counter()  # by kernel or cuBLAS function; those of graphs apart
        self.graphs_played = self.waits = self.uploads = 0


emulation = Emulation()


def enqueue(name: str, work: Callable[[], None]) -> None:
    """Do it now, or record it where a graph is being captured."""
    recording = cuda.Stream._current._recording
    if recording is not None:
        recording.append(work)
        return
    emulation.launches[name] += 1
    work()


def _not_while_capturing(what: str) -> None:
    if cuda.Stream._current._recording is not None:
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} while a graph is captured")


class _MemoryPointer:
    """A place in the device's memory, as `cupy.cuda.MemoryPointer`."""

    def __init__(self, mem: np.ndarray, offset: int) -> None:
        self._array, self._offset = mem, offset
        self.ptr = mem.ctypes.data + offset

    def __add__(self, offset: int) -> _MemoryPointer:
        return _MemoryPointer(self._array, self._offset + offset)


class ndarray:  # noqa: N801
    """Memory of the device, as `cupy.ndarray`; made with `memptr` it is as if nobody wrote it yet."""

    __array_ufunc__ = None  # NumPy's operators and functions raise TypeError
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any = float, memptr: _MemoryPointer | None = None) -> None:
        if memptr is None:
            memory = np.empty(shape, dtype)
        else:
            memory = np.ndarray(shape, dtype, memptr._array.data, memptr._offset)
        recording = cuda.Stream._current._recording
        if recording is None:
            _poison(memory)
        else:  # what nobody writes is found in every play
            recording.append(lambda: _poison(memory))
        self._adopt(memory)

    def _adopt(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.shape, self.dtype, self.strides = memory.shape, memory.dtype, memory.strides
        self.ndim, self.size, self.nbytes = memory.ndim, memory.size, memory.nbytes
        self.itemsize, self.flags = memory.itemsize, memory.flags
        self.data = _MemoryPointer(memory, 0)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} on an array of the device")

    def __len__(self) -> int:
        return len(self._memory)

    def __bool__(self) -> bool:
        raise TypeError("a value of the device decides on the host: a hidden wait")

    def reshape(self, *shape: Any) -> ndarray:
        view = self._memory.reshape(*shape)
        if self.size and not np.shares_memory(view, self._memory):
            raise ValueError("a reshape that copies")
        return _array(view)

    def view(self, dtype: Any) -> ndarray:
        return _array(self._memory.view(dtype))

    def __getitem__(self, where: Any) -> ndarray:
        for part in _tuple(where):
            if not (part is None or part is Ellipsis or isinstance(part, slice | int)):
                raise TypeError(f"indexing by {type(part).__name__}: a kernel's work")
        view = self._memory[where]
        return _array(
            view if isinstance(view, np.ndarray) else self._memory[(*_tuple(where), None)].reshape(())
        )

    def __setitem__(self, where: Any, value: Any) -> None:
        target = self[where]._memory
        if isinstance(value, ndarray):
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise ValueError(f"{value.dtype}{value.shape} into {target.dtype}{target.shape}")
            source = value._memory
        elif isinstance(value, int | float):
            source = value
        else:
            raise TypeError(f"Unsupported type {type(value)}")

        def copy() -> None:
            target[...] = source

        enqueue("copy", copy)

    def get(self) -> np.ndarray:
        _not_while_capturing("a copy to the host")
        emulation.waits += 1
        return self._memory.copy()

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError(f"{arr.dtype}{arr.shape} into {self.dtype}{self.shape}")
        _not_while_capturing("a copy to the device")
        emulation.uploads += 1
        self._memory[...] = arr


def _array(memory: np.ndarray) -> ndarray:
    array = ndarray.__new__(ndarray)
    array._adopt(memory)
    return array


def _tuple(where: Any) -> tuple[Any, ...]:
    return where if isinstance(where, tuple) else (where,)


def _poison(memory: np.ndarray) -> None:
    if memory.size:
        memory.view(np.uint8).reshape(-1)[...] = 1 if memory.dtype == np.bool_ else POISON


def empty(shape: Any, dtype: Any = float) -> ndarray:
    _not_while_capturing("an allocation")
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size > emulation.device_bytes:
        raise cuda.memory.OutOfMemoryError(size)
    return ndarray(shape, dtype)


def _pinned(size: int) -> Any:
    return memoryview(bytearray(size))


def get_default_memory_pool() -> Any:
    """As CuPy's, one that keeps nothing."""
    return SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None, total_bytes=lambda: 0)


# ---- kernels ---------------------------------------------------------------------------------


class RawModule:
    """As `cupy.RawModule(code=...)`; compiled by g++ at the first kernel asked for."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self._code, self._options, self._library = code, options, None

    def get_function(self, name: str) -> Callable[..., None]:
        if self._library is None:
            library = str(compiled(self._code, self._options))
            self._library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # for `emulator_fibers`
        return _Kernel(self._library, name)


class _Kernel:
    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._launch, signature = (
            getattr(library, f"launch_{name}"),
            getattr(library, f"signature_{name}"),
        )
        self._launch.restype = signature.restype = ctypes.c_char_p
        self._launch.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_void_p,
        ]
        self._name, self._parameters = name, signature().decode().split()

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        if len(args) != len(self._parameters):
            raise TypeError(
                f"{self._name}: {len(args)} arguments for {len(self._parameters)} parameters"
            )
        if any(not 1 <= n <= most for n, most in zip(grid, MAX_GRID, strict=False)):
            raise ValueError(f"{self._name}: a grid of {grid}")
        if min(block) < 1:  # CuPy makes 1 of it
            raise ValueError(f"{self._name}: a block of {block}")
        values = []
        for i, (argument, wanted) in enumerate(zip(args, self._parameters, strict=True)):
            if isinstance(argument, ndarray):
                found, value = "p" + _letter(argument.dtype), np.uint64(argument.data.ptr)
            elif isinstance(argument, np.generic):
                found, value = _letter(argument.dtype), argument
            else:
                raise TypeError(f"{self._name}: argument {i} is {type(argument)}")
            if found != wanted:
                raise TypeError(f"{self._name}: argument {i} is {found!r}, the parameter {wanted!r}")
            values.append(np.array([value]))
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        size = [(ctypes.c_uint * 3)(*(max(1, n) for n in (*s, 1, 1)[:3])) for s in (grid, block)]

        def work(values: Any = (values, args)) -> None:  # which keeps the memory
            error = self._launch(*size, shared_mem, emulation.order_seed, pointers)
            if error:
                raise RuntimeError(f"{self._name}: {error.decode()}")

        enqueue(self._name, work)


def _letter(dtype: np.dtype[Any]) -> str:
    return {"l": "q", "L": "Q"}.get(dtype.char, dtype.char)


# ---- cupy.cuda -------------------------------------------------------------------------------


class _Graph:
    """As `cupy.cuda.Graph`."""

    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self._recorded = recorded

    def launch(self, stream: Any = None) -> None:
        emulation.graphs_played += 1
        for work in self._recorded:
            work()


class _Stream:
    """As `cupy.cuda.Stream`."""

    _current: Any

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self._recording: list[Callable[[], None]] | None = None
        self.ptr = 0

    def use(self) -> _Stream:
        _Stream._current = self
        return self

    def synchronize(self) -> None:
        _not_while_capturing("a wait")
        emulation.waits += 1

    def begin_capture(self, mode: Any = None) -> None:
        self._recording = []

    def end_capture(self) -> _Graph:
        recorded, self._recording = self._recording, None
        assert recorded is not None
        return _Graph(recorded)


class _Event:
    """As `cupy.cuda.Event`: what it marks is always done."""

    done = True

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = perf_counter()

    def synchronize(self) -> None:
        emulation.waits += 1


class _Device:
    """As `cupy.cuda.Device`."""

    compute_capability = "90"
    attributes = {"MultiProcessorCount": 132}  # noqa: RUF012


class _OutOfMemoryError(MemoryError):
    pass


cuda = SimpleNamespace(
    Stream=_Stream,
    Event=_Event,
    Device=_Device,
    Graph=_Graph,
    get_current_stream=lambda: _Stream._current,
    get_elapsed_time=lambda start_event, end_event: (end_event._time - start_event._time) * 1e3,
    MemoryPointer=_MemoryPointer,
    alloc_pinned_memory=_pinned,
    memory=SimpleNamespace(OutOfMemoryError=_OutOfMemoryError),
    runtime=SimpleNamespace(
        memGetInfo=lambda: (emulation.device_bytes, emulation.device_bytes),
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDeviceProperties=lambda device: {"name": b"emulated"},
    ),
)
_Stream._current = _Stream()
