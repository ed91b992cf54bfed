"""One layer of a trace by itself: what went into it there, and whether what we compute comes out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mhmoe_np.comparison.from_inputs import Ids, Layer, layer_from, others_of, taken
from mhmoe_np.comparison.given import Given, Others
from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.comparison.two_traces import compare_tensors
from mhmoe_np.model.language_model import Model
from mhmoe_np.types import BoolArray, FloatArray, IntArray

NAMES = ("router_logits", "experts", "hidden")


class Case(NamedTuple):
    """One layer's inputs, and what came out of it there."""

    number: int
    theirs: Trace  # by names within the layer
    x_ND: FloatArray
    others: Others
    sequences: int
    tolerance: float | None

    @classmethod
    def of(
        cls,
        number: int,
        theirs: Trace,
        ours: Trace,
        model: Model,
        ids: Ids,
        *,
        tolerance: float | None,
    ) -> Case:
        """Layer `number` of a trace; ours takes the place of what it leaves out."""
        config, N = model.config, ids.id_BT.size
        if number == 0:
            x_ND = model.weights.embedding_VD[ids.id_BT.ravel()]
        else:
            before = f"layers.{number - 1}.hidden"
            x_ND = taken(theirs, before, ours[before]).reshape(N, -1)
        prefix = f"layers.{number}."
        own = {
            name: theirs[prefix + name]
            for name in NAMES
            if prefix + name in theirs and prefix + name in ours
        }
        others = others_of(theirs, number, config, model.weights.dtype, sub_tokens=N * config.moe_heads)
        return cls(number, own, x_ND, others, len(ids.id_BT), tolerance)

    def computed(self, layer: Layer, code_N: IntArray | None, given: Given) -> Trace:
        """What a layer makes of these inputs.

        code_N: how ties are rounded, see `Given.enter`; None: as ours are.

        Shapes   code_N?
        """
        if code_N is None:
            code_N = np.zeros(len(self.x_ND), np.int64)
        ours, _ = layer_from(
            layer, self.x_ND, self.others, code_N, None, sequences=self.sequences, ops=given
        )
        return ours

    def distance(self, ours: Trace) -> float | None:
        """How far their tensors are off at most, relative; None: one is beyond its tolerance."""
        farthest = 0.0
        for name in self.theirs:
            row = compare_tensors(name, self.theirs, ours, tolerance=self.tolerance)
            if row.verdict == "different":
                return None
            if row.verdict == "same" and row.difference is not None:
                farthest = max(farthest, row.difference.max_rel)
        return farthest

    def close_tokens(self, ours: Trace) -> BoolArray:
        """Which tokens' rows come out in every tensor of floats.

        Shapes   -> [N]
        """
        close_N = np.ones(len(self.x_ND), bool)
        for name in self.theirs.keys() - {"experts"}:
            row = compare_tensors(name, self.theirs, ours, tolerance=self.tolerance)
            a, b = self.theirs[name], ours[name]
            if a.size == b.size:
                allowed = row.tolerance * max(np.abs(a).max(), np.abs(b).max())
                gap = np.abs(a.reshape(len(close_N), -1) - b.reshape(len(close_N), -1))
                close_N &= (gap <= allowed).all(axis=1)
        return close_N
