"""Two traces beside each other: every tensor of both, in the order of computation.

Floats are held to a tolerance, integers (the experts chosen) must be equal. Where two implementations
choose another expert because the router's logits are equal to rounding, that is a tie and no failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_np.audit.computation_order import in_order
from mhmoe_np.comparison.difference import (
    TOLERANCES,
    Difference,
    Tensor,
    coarser,
    difference,
    reach_of_tie,
)
from mhmoe_np.comparison.patterns import pattern
from mhmoe_np.comparison.trace_file import Trace

Verdict = Literal["same", "tie", "different"]


class Row(NamedTuple):
    """One tensor of both traces."""

    name: str
    shape: tuple[int, ...]
    tolerance: float  # of integers: 0
    verdict: Verdict
    difference: Difference | None  # None: the shapes differ
    note: str  # what there is to say of it; empty: nothing

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = self._asdict() | {"shape": list(self.shape)}
        if self.difference is not None:
            values["difference"] = self.difference._asdict() | {"place": list(self.difference.place)}
        return values


class Comparison(NamedTuple):
    """What came of two traces."""

    rows: list[Row]  # in the order of computation
    only_first: list[str]
    only_second: list[str]

    @property
    def first_difference(self) -> Row | None:
        """The first tensor beyond its tolerance."""
        return next((row for row in self.rows if row.verdict == "different"), None)


def tolerance_of(first: Tensor, second: Tensor, tolerance: float | None) -> float:
    """The given one, or that of the coarser dtype; 0 for integers."""
    if first.dtype.kind != "f" or second.dtype.kind != "f":
        return 0.0
    return TOLERANCES[coarser(first, second)] if tolerance is None else tolerance


def compare_traces(first: Trace, second: Trace, *, tolerance: float | None = None) -> Comparison:
    """Each tensor that both have. Patterns are told of `first` as seen from `second`.

    tolerance: of every float tensor, relative; None: by its dtype (`TOLERANCES`).
    """
    rows = [
        compare_tensors(name, first, second, tolerance=tolerance)
        for name in in_order(first.keys() & second.keys())
    ]
    return Comparison(
        rows, in_order(first.keys() - second.keys()), in_order(second.keys() - first.keys())
    )


def compare_tensors(
    name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, tolerance: float | None
) -> Row:
    """The tensor of that name in both, which may be laid out in other axes of the same order."""
    a, b = first[name], second[name]
    allowed, note = tolerance_of(a, b, tolerance), ""
    if a.shape != b.shape:
        if not _same_order(a.shape, b.shape):
            found = pattern(a, b, tolerance=allowed) if a.size == b.size else None
            note = f"shapes {list(a.shape)} and {list(b.shape)}"
            note += f"; it is {found}" if found else ""
            return Row(name, a.shape, allowed, "different", None, note)
        if a.size > 1:
            note = f"shape {list(b.shape)} in the second, compared in its order"
        b = b.reshape(a.shape)
    measured = difference(a, b)
    verdict: Verdict = "same" if measured.max_rel <= allowed else "different"
    if verdict == "different" and name.rpartition(".")[2] == "experts":
        layer = name.removesuffix("experts")
        if is_tie(a, b, first.get(f"{layer}router_logits"), tolerance=tolerance):
            verdict, note = "tie", _tied(a, b)
    if verdict == "different" and name.endswith(".input_integers"):
        x, scale = (
            first.get(name.replace("input_integers", part)) for part in ("input", "input_scale")
        )
        if are_rounded_otherwise(a, b, x, scale):
            verdict, note = "tie", "at the quantiser's tie (D9), one step of 1/127"
    if verdict == "different" and (found := pattern(a, b, tolerance=allowed)):
        note = f"it is {found}"
    return Row(name, a.shape, allowed, verdict, measured, note)


def _same_order(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are one with axes joined, as [B, T, D] and [N, D]."""
    if not shape or not other:
        return np.prod(shape) == np.prod(other)
    return shape[-1] == other[-1] and np.prod(shape) == np.prod(other)


def is_tie(experts: Tensor, others: Tensor, logits: Tensor | None, *, tolerance: float | None) -> bool:
    """Whether choices that differ are between experts whose logits are equal to rounding.

    experts, others: K of each sub-token; logits: E of each; None: the trace does not have them.
    """
    if logits is None or logits.ndim < 2 or experts.ndim < 2:
        return False
    chosen, other = (each.reshape(-1, each.shape[-1]).astype(np.int64) for each in (experts, others))
    logits_ME = logits.reshape(-1, logits.shape[-1])
    if len(logits_ME) != len(chosen):
        return False
    for each in (chosen, other):
        if each.min() < 0 or each.max() >= logits_ME.shape[1]:
            return False
        if (np.diff(np.sort(each, axis=1), axis=1) == 0).any():
            return False
    of_chosen, of_other = (np.take_along_axis(logits_ME, each, axis=1) for each in (chosen, other))
    allowed = tolerance_of(logits, logits, tolerance) * np.abs(logits).max()
    return bool(np.abs(of_chosen - of_other).max() <= allowed)


def are_rounded_otherwise(q: Tensor, other: Tensor, x: Tensor | None, scale: Tensor | None) -> bool:
    """Whether integers of activations differ by one step, and only half-way between the two [D9].

    x, scale: what q is of, and gamma/127 of each row; None: the trace does not say.
    """
    if x is None or scale is None or x.size != q.size or scale.size * q.shape[-1] != q.size:
        return False
    product = x.reshape(-1, q.shape[-1]) / scale.reshape(-1, 1)
    middle = (q.astype(np.float64) + other) / 2
    differs = (q != other).reshape(product.shape)
    gap = np.abs(product - middle.reshape(product.shape))[differs]
    steps = np.abs(q.astype(np.int64) - other)[q != other]
    return bool((steps == 1).all() and (gap <= reach_of_tie(x.dtype)).all())


def _tied(experts: Tensor, others: Tensor) -> str:
    rows = np.flatnonzero((experts != others).reshape(-1, experts.shape[-1]).any(axis=1))
    some = "a sub-token chooses" if len(rows) == 1 else f"{len(rows)} sub-tokens choose"
    return f"{some} between experts whose logits are equal to rounding, the first in row {rows[0]}"
