"""The door of every operation: what the table's docstrings promise, checked at each call.

`Checked(ops)` computes what `ops` computes and holds each call to the sections Shapes, Dtypes and
Views of the operation's docstring in `table`: there is no second list. Tests and `gradcheck` come
through this door; production does not.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.packing import PackedMatrices
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight

PACKAGE = Path(__file__).parents[1]
SECTIONS = "Shapes|Dtypes|Views|Raises|Source|Cost"


class BrokenPromise(ValueError):
    """A call or a result that the operation's docstring does not allow."""


class Promise(NamedTuple):
    """What the docstring of one operation says of its arrays."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    may_be_none: frozenset[str]
    dtypes: Mapping[str, str]  # of arrays that are not of the call's float dtype
    views: frozenset[str]  # arguments that need not be C-contiguous


def sections_of(docstring: str) -> dict[str, str]:
    """Section name -> its text on one line, of an operation's docstring."""
    parts = re.split(rf"^ *({SECTIONS}) +", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def promises() -> dict[str, Promise]:
    """The promises of every operation that has the section Shapes."""
    found = {}
    for name, operation in vars(Operations).items():
        sections = sections_of(getattr(operation, "__doc__", None) or "")
        if "Shapes" not in sections:
            continue
        given, _, returned = sections["Shapes"].partition("->")
        arguments, results = _names(given), _names(returned)
        dtypes: dict[str, str] = {}
        for clause in sections["Dtypes"].split(";"):
            dtype, *named = clause.replace(",", " ").split()
            dtypes |= dict.fromkeys(named, dtype)
        found[name] = Promise(
            tuple(word.rstrip("?") for word in arguments),
            tuple(word.rstrip("?") for word in results),
            frozenset(word[:-1] for word in arguments + results if word.endswith("?")),
            dtypes,
            frozenset(_names(sections.get("Views", ""))),
        )
    return found


def _names(text: str) -> list[str]:
    return text.replace(",", " ").split()


def axes_of(name: str) -> list[str] | None:
    """The axes that a name's suffix says: `gate_up_N2F` -> N, 2F; None where it has no suffix."""
    _, underscore, suffix = name.rpartition("_")
    if not underscore or not re.fullmatch(r"[A-Z0-9]+", suffix):
        return None
    return re.findall(r"2[A-Z]|[A-Z]|\d", suffix)


def calling_place() -> str:
    """File, line and function of the innermost call that comes from outside `operations`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "operations"):
            break
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE.parent) else path
    return f"{shown}:{frame.f_lineno} ({frame.f_code.co_name})"


class _Call:
    """One call of one operation: the sizes and the dtype that it has used so far."""

    def __init__(self, operation: str, promise: Promise) -> None:
        self._operation, self._promise = operation, promise
        self._sizes: dict[str, tuple[int, str]] = {}
        self._float: tuple[Any, str] | None = None

    def check(self, values: Mapping[str, Any]) -> None:
        """Hold arguments or results, by name, to what their names and the docstring say.

        Shapes first, of all of them: a transposed array is also one that is not contiguous, and its
        letters say more.
        """
        for name, value in values.items():
            if value is None and name not in self._promise.may_be_none:
                self._broken(name, "is None")
        arrays = [
            (name, *labelled) for name, value in values.items() for labelled in _arrays(name, value)
        ]
        for _, label, _, shape in arrays:
            self._check_axes(label, shape)
        for name, label, array, _ in arrays:
            self._check_dtype(label, array.dtype)
            self._check_order(label, array, may_be_view=name in self._promise.views)

    def _check_axes(self, name: str, shape: tuple[int, ...]) -> None:
        axes = axes_of(name.partition(".")[2] or name)
        if axes is None:
            return
        if len(axes) != len(shape):
            self._broken(name, f"has {len(shape)} axes {list(shape)}; its name says {len(axes)}")
        for axis, size in zip(axes, shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    self._broken(name, f"has {size} where its name says {axis}")
                continue
            letter = axis[-1]
            if len(axis) == 2:
                if size % 2:
                    self._broken(name, f"has {size} for {axis}, which is odd")
                size //= 2
            known, source = self._sizes.setdefault(letter, (size, name))
            if known != size:
                self._broken(name, f"says {letter} = {size}, {source} says {letter} = {known}")

    def _check_dtype(self, name: str, dtype: Any) -> None:
        wanted = self._promise.dtypes.get(name.rpartition(".")[2])
        if wanted is not None:
            if dtype != np.dtype(wanted):
                self._broken(name, f"is {dtype}; must be {wanted}")
            return
        if dtype not in (np.float32, np.float64):
            self._broken(name, f"is {dtype}; must be float32 or float64")
        if self._float is None:
            self._float = dtype, name
        known, source = self._float
        if dtype != known:
            self._broken(name, f"is {dtype}, {source} is {known}")

    def _check_order(self, name: str, array: Any, *, may_be_view: bool) -> None:
        if may_be_view:
            if array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
                self._broken(name, "is not contiguous in its last axis")
        elif not array.flags.c_contiguous:
            self._broken(name, "is not C-contiguous")

    def _broken(self, name: str, how: str) -> None:
        raise BrokenPromise(f"{self._operation}: {name} {how}; at {calling_place()}")


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Label, array and shape of every array in an argument; a label's last part has the suffix."""
    if isinstance(value, BitWeight):
        suffix = name.rpartition("_")[2]
        yield name, value.w, value.w.shape
        yield f"{name}.beta_{suffix[:-1]}", value.beta, value.beta.shape
    elif isinstance(value, PackedWeight):
        shape = value.shape if len(axes_of(name) or ()) == 3 else value.shape[1:]
        yield name, value.beta, shape
    elif isinstance(value, PackedMatrices):
        return
    elif isinstance(value, tuple):
        for field, part in zip(value._fields, value, strict=True):  # type: ignore[attr-defined]
            if hasattr(part, "dtype"):
                yield f"{name}.{field}", part, part.shape
    elif hasattr(value, "dtype"):
        yield name, value, value.shape


class Checked:
    """The operations of a backend behind the door; what is not an operation goes straight through.

    Raises BrokenPromise: it names the operation, the argument, the letter with both sizes (or the dtype
    or the order), and the line of the model that called.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        """The operation of this name."""
        operation = getattr(self._ops, name)
        promise = promises().get(name)
        return operation if promise is None else _behind_the_door(name, operation, promise)


def _behind_the_door(name: str, operation: Callable[..., Any], promise: Promise) -> Callable[..., Any]:
    signature = inspect.signature(getattr(Operations, name))

    def call(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(None, *arguments, **options).arguments
        door = _Call(name, promise)
        door.check({name: bound[name] for name in promise.arguments if name in bound})
        result = operation(*arguments, **options)
        found = list(_flat(result))
        if len(found) != len(promise.results):
            raise BrokenPromise(f"{name}: returned {len(found)} arrays, not {len(promise.results)}")
        door.check(dict(zip(promise.results, found, strict=True)))
        return result

    return call


def _flat(result: Any) -> Iterator[Any]:
    """The arrays of a result, None where an optional one is absent."""
    if isinstance(result, tuple):
        for part in result:
            yield from _flat(part) if isinstance(part, tuple) else (part,)
    elif result is not None:
        yield result
