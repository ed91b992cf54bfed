"""Standing between the model and a backend: every call of an operation, its arrays by name.

The names are those of the table's docstrings, section Shapes: there is no second list.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from mhmoe_np.operations.packing import PackedMatrices
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight

SECTIONS = "Equation|Shapes|Dtypes|Views|Raises|Source|Cost"


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


def arrays_in(name: str, value: Any) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
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


class Visit(Protocol):
    """One call of one operation, seen from the door."""

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """Before it: the arrays given, by name, and None where an optional one is absent."""

    def leave(self, results: Sequence[Any]) -> None:
        """After it: the arrays returned, in the docstring's order."""


class Door:
    """The operations of a backend behind a door; what is not an operation goes straight through."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops

    def visit(self, operation: str, promise: Promise) -> Visit:
        """Who looks at this call."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """The operation of this name."""
        operation = getattr(self._ops, name)
        promise = promises().get(name)
        return operation if promise is None else self._behind(name, operation, promise)

    def _behind(self, name: str, operation: Callable[..., Any], promise: Promise) -> Callable[..., Any]:
        signature = inspect.signature(getattr(Operations, name))

        def call(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(None, *arguments, **options).arguments
            visit = self.visit(name, promise)
            visit.enter({name: bound[name] for name in promise.arguments if name in bound})
            result = operation(*arguments, **options)
            visit.leave(list(flat(result)))
            return result

        return call


def flat(result: Any) -> Iterator[Any]:
    """The arrays of a result, None where an optional one is absent."""
    if isinstance(result, tuple):
        for part in result:
            yield from flat(part) if isinstance(part, tuple) else (part,)
    elif result is not None:
        yield result
