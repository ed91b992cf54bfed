"""Activations at the quantiser's tie [D9]: how another implementation must have rounded them.

Two right implementations differ there by one step of 1/127. Every way to round a token's tied
activations is tried; those with which the token's rows come out are its ways. What the layer's output
does not tell, because a later quantiser takes the step back, the gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mhmoe_np.comparison.from_inputs import Layer
from mhmoe_np.comparison.given import Given, Tie
from mhmoe_np.comparison.one_layer import Case
from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.types import IntArray

MOST_TIES = 8  # of one token in one layer: each doubles the ways to round that are tried
MOST_TRIALS = 256  # of the whole model, for what gradients alone tell

Ways = list[list[int]]
"""For each token the codes (`Given.enter`) with which its rows come out."""


def ways_of(case: Case, layer: Layer, given: Given) -> Ways:
    """Every way to round the tied activations of each token, for all tokens at once."""
    ways: Ways = [[] for _ in case.x_ND]
    most = 0
    for code in range(1 << MOST_TIES):
        ours = case.computed(layer, np.full(len(case.x_ND), code), given)
        most = max(most, int(given.met_N.max(initial=0)))
        # A code beyond the ties that were met repeats a smaller one.
        for token in np.flatnonzero(case.close_tokens(ours) & (code >> given.met_N == 0)):
            ways[token].append(code)
        if code + 1 >= 1 << most:
            break
    return ways


def first_way(ways: Ways) -> IntArray | None:
    """The first way of every token; None: one has none.

    Shapes   -> code_N
    """
    return np.array([codes[0] for codes in ways]) if all(ways) else None


def settled_by_gradients(
    theirs: Trace,
    ways: Mapping[int, Ways],
    codes: Mapping[int, IntArray],
    compute: Callable[[Mapping[int, IntArray]], Trace],
) -> dict[int, IntArray]:
    """Of ways that the forward leaves open, those with which the gradients come out best.

    From the last layer to the first, as gradients are computed, and token by token.

    ways, codes: of each quantised layer. compute: our tensors with such codes.
    """
    chosen = {number: code_N.copy() for number, code_N in codes.items()}
    trials = 0
    for number in sorted(ways, reverse=True):
        prefix = f"grad.model.layers.{number}."
        least = _distance(theirs, compute(chosen), prefix)
        for token, open_codes in enumerate(ways[number]):
            for code in open_codes:
                trials += 1
                if code == chosen[number][token] or trials > MOST_TRIALS:
                    continue
                trial = {**chosen, number: chosen[number].copy()}
                trial[number][token] = code
                distance = _distance(theirs, compute(trial), prefix)
                if distance < least:
                    least, chosen = distance, trial
    return chosen


def _distance(theirs: Trace, ours: Trace, prefix: str) -> float:
    """How far one layer's gradients are off, each against its own size."""
    total = 0.0
    for name in theirs.keys() & ours.keys():
        if name.startswith(prefix) and theirs[name].size == ours[name].size:
            scale = float(np.linalg.norm(theirs[name])) or 1.0
            total += float(np.linalg.norm(theirs[name].ravel() - ours[name].ravel())) / scale
    return total


def said_of(ties: list[Tie]) -> str:
    """A finding's text."""
    tie = ties[0]
    count = "1 activation lies" if len(ties) == 1 else f"{len(ties)} activations lie"
    return (
        f"{count} at the quantiser's tie and rounded to the other side there, one step of 1/127 (D9); "
        f"the first is in row {tie.row}, column {tie.column} of the input of {tie.weight}: "
        f"x * 127/gamma = {tie.product:.12g}"
    )
