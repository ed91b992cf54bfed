"""Watching local variables: whether arrays have the shapes that their names say, while code runs.

A name's suffix is a claim: `x_ND` has one axis of N tokens and one of D features. It is held when a
function returns: an array has as many axes as its suffix says, and each letter has one size within the
function. What a named tuple's fields say must agree with the variables beside it and with the tuple's
other fields; two tuples need not agree with each other (the experts and the shared expert have an inner
width F each).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from mhmoe_np.operations.door import axes_of
from mhmoe_np.operations.table import BitWeight, PackedWeight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import DIMENSIONS

PACKAGE = Path(__file__).parents[2] / "mhmoe_np"
OF_ONE_MODEL = "layers", "model"  # rooms in which a letter means one size of the configuration
DEFINED = (
    ("N", "B", "*", "T"),
    ("M", "N", "*", "H"),
    ("D", "U", "*", "H"),
    ("C", "J", "*", "2"),
    ("Z", "E", "+", "1"),
)
Sizes = dict[str, tuple[int, str]]
"""The size of each letter, and the name that said so first."""


def sizes_of(config: ModelConfig) -> dict[str, set[int]]:
    """The sizes that letters may have where code knows the model."""
    A, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inner = {
        config.intermediate_size,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    }
    return {
        "D": {config.hidden_size},
        "V": {config.vocab_size},
        "L": {config.num_hidden_layers},
        "A": {A},
        "G": {G},
        "C": {C},
        "J": {C // 2},
        "Q": {(A + 2 * G) * C},
        "F": inner,
        "H": {config.moe_heads},
        "U": {config.sub_token_width},
        "E": {config.num_experts, 1},  # a single matrix is packed as a stack of one
        "Z": {config.num_experts + 1},
        "K": {config.num_experts_per_tok},
    }


class Watch:
    """Inside this context every function under `root` is held to its names when it returns.

    Attributes:
        faults: what was found, each once, in the order of discovery.
        seen: for each function that returned, as `path: name`, the names with a suffix that it had.
    """

    def __init__(self, *, root: Path = PACKAGE, config: ModelConfig | None = None) -> None:
        """config: the model that layers/ and model/ compute; None: their letters may have any size."""
        self._root = root
        self._rooms = tuple(f"{root}/{room}/" for room in OF_ONE_MODEL)
        self._known = {} if config is None else sizes_of(config)
        self.faults: dict[str, None] = {}
        self.seen: dict[str, set[str]] = {}

    def __enter__(self) -> Self:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "return" and file.startswith(f"{self._root}/"):
            path = Path(file).relative_to(self._root).as_posix()
            known = self._known if file.startswith(self._rooms) else {}
            _Frame(self, f"{path}: {frame.f_code.co_qualname}", known).check(frame.f_locals)


class _Frame:
    """One function that is about to return."""

    def __init__(self, watch: Watch, place: str, known: Mapping[str, set[int]]) -> None:
        self._watch, self._place, self._known = watch, place, known
        self._names = watch.seen.setdefault(place, set())

    def check(self, variables: Mapping[str, Any]) -> None:
        """Hold all local variables to their names."""
        sizes: Sizes = {}
        for name, value in variables.items():
            self._look(name, value, sizes)
        self._relate(sizes)
        for name, value in variables.items():
            self._look_inside(name, value, sizes)

    def _look_inside(self, name: str, value: Any, around: Sizes) -> None:
        """A named tuple's fields, beside what surrounds it; an object's attributes for themselves."""
        if isinstance(value, BitWeight | PackedWeight):
            return
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields, sizes = value._asdict(), dict(around)
        elif type(value).__module__.startswith("mhmoe_np.") and hasattr(value, "__dict__"):
            fields, sizes = vars(value), {}
        else:
            return
        for field, part in fields.items():
            self._look(f"{name}.{field}", part, sizes)
        for field, part in fields.items():
            if isinstance(part, tuple):
                self._look_inside(f"{name}.{field}", part, sizes)

    def _look(self, name: str, value: Any, sizes: Sizes) -> None:
        """One name with its value; a letter alone names a size (`N, D = x_ND.shape`)."""
        last = name.rpartition(".")[2]
        if last in DIMENSIONS and isinstance(value, int):
            self._say(last, value, name, sizes)
            return
        axes, shape = axes_of(last), _shape_of(value, last)
        if axes is None or shape is None or last.isupper() or all(axis.isdigit() for axis in axes):
            return
        self._names.add(last)
        if len(axes) != len(shape):
            self._fault(f"{name} has {len(shape)} axes {list(shape)}; its name says {len(axes)}")
            return
        for axis, size in zip(axes, shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    self._fault(f"{name} has {size} where its name says {axis}")
            elif size % len(axis):
                self._fault(f"{name} has {size} for {axis}, which is odd")
            else:
                self._say(axis[-1], size // len(axis), name, sizes)

    def _say(self, letter: str, size: int, name: str, sizes: Sizes) -> None:
        first, source = sizes.setdefault(letter, (size, name))
        if size != first:
            self._fault(f"{name} says {letter} = {size}, {source} says {letter} = {first}")
        allowed = self._known.get(letter, {size})
        if size not in allowed:
            model = " or ".join(map(str, sorted(allowed)))
            self._fault(f"{name} says {letter} = {size}, the model says {letter} = {model}")

    def _relate(self, sizes: Sizes) -> None:
        """Some letters are defined by others (`types.DIMENSIONS`)."""
        found = {letter: size for letter, (size, _) in sizes.items()}
        found |= {"H": min(self._known["H"])} if "H" in self._known else {}
        for letter, left, sign, right in DEFINED:
            known = {letter, left, right} - {"1", "2"}
            if known <= found.keys():
                a, b = found[left], int(right) if right.isdigit() else found[right]
                size = a + b if sign == "+" else a * b
                if found[letter] != size:
                    self._fault(f"{letter} = {found[letter]}, but {left}{sign}{right} = {size}")

    def _fault(self, what: str) -> None:
        self._watch.faults.setdefault(f"{self._place}: {what}")


def _shape_of(value: Any, name: str) -> tuple[int, ...] | None:
    """The shape of an array or of a weight in any form, () of a number; None: of something else."""
    if isinstance(value, PackedWeight):
        experts, *matrix = value.shape
        return (experts, *matrix) if len(axes_of(name) or ()) == 3 or experts > 1 else tuple(matrix)
    if isinstance(value, np.ndarray | BitWeight):
        return tuple(value.shape)
    return () if isinstance(value, int | float | np.generic) else None
