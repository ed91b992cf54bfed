"""The door that checks: what the table's docstrings promise, held at each call.

`Checked(ops)` computes what `ops` computes and holds each call to the sections Shapes, Dtypes and
Views of the operation's docstring in `table`. Tests and `gradcheck` come through this door; production
does not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_np.operations.door import Door, Promise, arrays_in, axes_of

PACKAGE = Path(__file__).parents[1]


class BrokenPromise(ValueError):
    """A call or a result that the operation's docstring does not allow."""


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

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """Hold the arguments to what is said of them."""
        self._check(arguments)

    def leave(self, results: Sequence[Any]) -> None:
        """Hold the results to what is said of them, beside the arguments."""
        promised = self._promise.results
        if len(results) != len(promised):
            raise BrokenPromise(
                f"{self._operation}: returned {len(results)} arrays, not {len(promised)}"
            )
        self._check(dict(zip(promised, results, strict=True)))

    def _check(self, values: Mapping[str, Any]) -> None:
        """Hold arguments or results, by name, to what their names and the docstring say.

        Shapes first, of all of them: a transposed array is also one that is not contiguous, and its
        letters say more.
        """
        for name, value in values.items():
            if value is None and name not in self._promise.may_be_none:
                self._broken(name, "is None")
        arrays = [
            (name, *labelled) for name, value in values.items() for labelled in arrays_in(name, value)
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


class Checked(Door):
    """The operations of a backend, every call held to its docstring.

    Raises BrokenPromise: it names the operation, the argument, the letter with both sizes (or the dtype
    or the order), and the line of the model that called.
    """

    def visit(self, operation: str, promise: Promise) -> _Call:
        """See `Door.visit`."""
        return _Call(operation, promise)
