"""A backend whose arrays refuse everything but what the table of operations allows.

It stands for a device: arrays of a class of their own, in memory that NumPy cannot see, computed with
by `numpy_ref`, so that the results have that backend's bits. What a device would refuse, or would do
slowly and silently, is an error here that names the line of the model: NumPy functions and operators,
host arrays given to operations, implicit `float()`, `bool()` and iteration, arrays used after their
scope, memory read before it was written (it holds NaN). Packed weights have a layout of their own. The
two doors are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.checked import Checked, calling_place
from mhmoe_np.operations.packing import FormatName, PackedMatrices
from mhmoe_np.operations.table import Operations


class NotOnTheDevice(TypeError):
    """What the model may not do with the backend's arrays; the message names the place."""


class _Memory:
    """Where an array and its views lie."""

    def __init__(self) -> None:
        self.alive = True


def _refuse(what: str) -> NoReturn:
    raise NotOnTheDevice(
        f"{what} at {calling_place()}: the backend's arrays take part in operations of the table alone"
    )


class StrictArray:
    """Memory of the device: it has a shape, gives views of itself and takes copies of its own kind."""

    def __init__(self, array: NDArray[Any], memory: _Memory) -> None:
        self._array, self._memory = array, memory

    def hidden(self) -> NDArray[Any]:
        """The numbers, for the backend alone."""
        if not self._memory.alive:
            _refuse("an array is used after its scope ended")
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        return self._array.strides

    @property
    def flags(self) -> Any:
        return self._array.flags

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    @property
    def size(self) -> int:
        return self._array.size

    @property
    def T(self) -> StrictArray:
        return StrictArray(self._array.T, self._memory)

    def __len__(self) -> int:
        return len(self._array)

    def reshape(self, *shape: Any) -> StrictArray:
        view = self.hidden().reshape(*shape)
        if self._array.size and not np.shares_memory(view, self._array):
            _refuse("reshape() that must copy")
        return StrictArray(view, self._memory)

    def _basic(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if not isinstance(part, int | slice) and part is not Ellipsis and part is not None:
                _refuse(f"an index of type {type(part).__name__}")
        return index

    def __getitem__(self, index: Any) -> StrictArray:
        view = self.hidden()[self._basic(index)]
        if not isinstance(view, np.ndarray):
            _refuse("a single number taken out of an array")
        return StrictArray(view, self._memory)

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self.hidden()[self._basic(index)]
        if isinstance(value, StrictArray):
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                _refuse(f"a copy of {value.shape} {value.dtype} into {target.shape} {target.dtype}")
            target[...] = value.hidden()
        elif isinstance(value, int | float):
            target[...] = value
        else:
            _refuse(f"an assignment of {type(value).__name__}")

    def __array_ufunc__(self, ufunc: Any, *_: Any, **__: Any) -> NoReturn:
        _refuse(f"np.{ufunc.__name__}")

    def __array_function__(self, function: Any, *_: Any, **__: Any) -> NoReturn:
        _refuse(f"np.{function.__name__}")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("conversion to a NumPy array")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f".{name}")


def _refused(name: str) -> Any:
    def method(self: StrictArray, *_: Any) -> NoReturn:
        _refuse(f"{name}()")

    return method


for _name in (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv"),
    *(
        "itruediv",
        "floordiv",
        "mod",
        "pow",
        "rpow",
        "matmul",
        "rmatmul",
        "imatmul",
        "neg",
        "pos",
        "abs",
    ),
    *(
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "and",
        "or",
        "xor",
        "invert",
        "float",
        "int",
        "bool",
        "index",
    ),
    *("complex", "iter", "contains", "round"),
):
    setattr(StrictArray, f"__{_name}__", _refused(f"__{_name}__"))


class StrictOperations:
    """`numpy_ref` on strict arrays.

    Attributes:
        doors: how often each door was used.
    """

    def __init__(self, *, prefers_packed: bool = False) -> None:
        self.name, self.prefers_packed = "strict", prefers_packed
        self.doors: Counter[str] = Counter()
        self._scopes: list[list[_Memory]] = []

    def _array(self, array: NDArray[Any], *, stays: bool = False) -> StrictArray:
        memory = _Memory()
        if self._scopes and not stays:
            self._scopes[-1].append(memory)
        return StrictArray(array, memory)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        array = np.empty(shape, dtype)
        array[...] = np.nan if array.dtype.kind == "f" else -1
        return self._array(array)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return self._array(np.zeros(shape, dtype), stays=True)

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        return self._packed(numpy_ref.empty_packed(experts, outputs, inputs, format))

    @contextmanager
    def scope(self) -> Iterator[None]:
        self._scopes.append([])
        try:
            yield
        finally:
            for memory in self._scopes.pop():
                memory.alive = False

    def buffer_bytes(self) -> int:
        return 0

    def device(self) -> None:
        return None

    def blas(self) -> None:
        return None

    def repeated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda fixed, *arrays: work(fixed, *map(self.to_device, arrays))

    def joined_step(self, branches: Any, **_: Any) -> None:
        return None

    def to_device(self, array: NDArray[Any]) -> Any:
        if not isinstance(array, np.ndarray):
            _refuse(f"to_device() of {type(array).__name__}")
        self.doors["to_device"] += 1
        return self._array(np.array(array, order="C"), stays=not self._scopes)

    def to_host(self, array: Any) -> NDArray[Any]:
        if not isinstance(array, StrictArray):
            _refuse(f"to_host() of {type(array).__name__}")
        self.doors["to_host"] += 1
        return array.hidden().copy()

    def packed_to_device(self, packed: PackedMatrices) -> PackedMatrices:
        self.doors["packed_to_device"] += 1
        return self._packed(packed)

    def packed_to_host(self, packed: PackedMatrices) -> PackedMatrices:
        self.doors["packed_to_host"] += 1
        return self._unpacked(packed)

    def _packed(self, packed: PackedMatrices) -> PackedMatrices:
        """This device keeps the 64 bytes of a group backwards."""
        code = self._array(packed.code[..., ::-1].copy(), stays=True)
        return packed._replace(code=cast(Any, code))

    def _unpacked(self, packed: PackedMatrices) -> PackedMatrices:
        code = cast(StrictArray, packed.code).hidden()
        return packed._replace(code=np.ascontiguousarray(code[..., ::-1]))

    def pack_in_place(self, q_EOI: Any, packed: PackedMatrices) -> None:
        host = self._unpacked(packed)
        numpy_ref.pack_in_place(q_EOI.hidden(), host)
        cast(StrictArray, packed.code).hidden()[...] = host.code[..., ::-1]

    def __getattr__(self, name: str) -> Any:
        operation = getattr(numpy_ref, name)

        def call(*arguments: Any, **options: Any) -> Any:
            given: dict[int, StrictArray] = {}
            inside = [self._inside(name, argument, given) for argument in arguments]
            result = operation(
                *inside, **{key: self._inside(name, value, given) for key, value in options.items()}
            )
            return self._outside(result, given)

        return call

    def _inside(self, operation: str, value: Any, given: dict[int, StrictArray]) -> Any:
        if isinstance(value, StrictArray):
            array = value.hidden()
            given[id(array)] = value
            return array
        if isinstance(value, np.ndarray):
            _refuse(f"{operation}() of a host array")
        if isinstance(value, PackedMatrices):
            return self._unpacked(value)
        if isinstance(value, tuple):
            parts = [self._inside(operation, part, given) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def _outside(self, value: Any, given: dict[int, StrictArray]) -> Any:
        if isinstance(value, np.ndarray):
            known = given.get(id(value))
            return self._array(np.ascontiguousarray(value)) if known is None else known
        if isinstance(value, tuple):
            parts = [self._outside(part, given) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value


def strict_operations(*, prefers_packed: bool = False) -> tuple[Operations, StrictOperations]:
    """The strict backend behind the door of `checked`, and itself, for its counters."""
    strict = StrictOperations(prefers_packed=prefers_packed)
    return cast(Operations, Checked(cast(Operations, strict))), strict
