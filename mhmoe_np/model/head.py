"""The output head in fewer bits, and the float32 head's most probable tokens without reading it all.

An 8-bit head's logits are near the float32 head's by a proven bound. So few tokens can be the most
probable ones, and theirs alone are computed in float32.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.operations.int8 import (
    LARGEST_WEIGHT,
    Int8Weight,
    blocks_of,
    from_int8,
    quantise_blocks,
    to_int8,
)
from mhmoe_np.operations.packing import PANEL
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray

HeadDtype = Literal["float32", "bfloat16", "int8", "exact"]
ROUNDING = 2.0**-24  # of a float32, relative to the number
UNDERFLOW = 1e-30  # more than all products of a sum can lose by being subnormal, or 0
SLACK = 1 + 1e-9  # for the bound's own roundings, in float64
PANELS = 256  # of the head that are looked at at once
GROUP = 16  # neighbouring rows of the head that are multiplied together, as a whole head's are


def int8_head(output_VD: FloatArray) -> Int8Weight:
    """The host's output head in 8 bits.

    Shapes   output_VD
    Raises   UserError: it holds a weight that is too large.
    Source   [spec 5 8-bit weights]
    """
    try:
        return to_int8(output_VD[None].astype(np.float32, copy=False))
    except ValueError:
        raise UserError(
            f"the output head has weights that are not finite or beyond {LARGEST_WEIGHT:,.0f}, for "
            "which int8 has no scale; give --head-dtype float32"
        ) from None


def growth(terms: int) -> float:
    """How far a float32 sum of so many products may be off, in any order, of the sum of their sizes.

    Source   [Higham section 3.1], gamma_n = n u / (1 - n u)
    """
    return terms * ROUNDING / (1 - terms * ROUNDING)


class Bound(NamedTuple):
    """How far a token's score may be from its logit, for one x: two factors, and what they multiply."""

    off_V: FloatArray  # |w - w^| of each token
    size_V: FloatArray  # |w^|
    by_off: float
    by_size: float

    def of(self, tokens: IntArray) -> FloatArray:
        """Of some tokens, a number each.

        Shapes   tokens -> bounds
        Source   [spec 5 8-bit weights]
        """
        return self._sum(self.off_V[tokens], self.size_V[tokens])

    def largest(self, most: tuple[float, float]) -> float:
        """Of a token with these two norms, the largest that there are: no token's is larger.

        Source   [spec 5 8-bit weights]
        """
        return float(self._sum(*most))

    def _sum(self, off: Any, size: Any) -> Any:
        return (off * self.by_off + size * self.by_size) * SLACK + UNDERFLOW


class ExactHead:
    r"""The logits that a float32 head gives its most probable tokens, by 8-bit scores of all.

    Let w be a row of the head, x what it meets, and \hat w, \hat x what both act as in 8 bits. Then
    w x - \hat w \hat x = (w - \hat w) x + \hat w (x - \hat x), and by Cauchy and Schwarz

        |w x - \hat w \hat x|  <=  |w - \hat w| |x| + |\hat w| |x - \hat x|.

    The norms are measured: those of rows once, those of x for each token. Both sides are computed in
    float32: the score is off by at most growth(blocks + 2) |\hat w| |\hat x|, since a block's sum of
    integers is exact, its product with the scales rounds twice and is then added up; the logit by at
    most growth(D) |w| |x|, whatever the order of its sum. The four together are a token's bound.

    So the k tokens of the largest scores have logits of at least the least of their score - bound. A
    token whose score + bound is less is none of the k largest, however ties are decided.

    Attributes:
        weight: the head in 8 bits, whose logits are the scores.
    """

    def __init__(self, output_VD: FloatArray, *, ops: Operations) -> None:
        """Of the backend's output head.

        Raises UserError: see `int8_head`.
        """
        self._output_VD, self._ops = output_VD, ops
        w_VD = ops.to_host(output_VD)
        self.weight = int8_head(w_VD)
        size, off = np.empty(len(w_VD)), np.empty(len(w_VD))
        for first in range(0, self.weight.q.shape[1], PANELS):
            rows = slice(first * PANEL, (first + PANELS) * PANEL)
            part = self.weight.panels(first, first + PANELS)
            acting = from_int8(part)[0].astype(np.float64)
            size[rows] = np.linalg.norm(acting, axis=1)
            off[rows] = np.linalg.norm(w_VD[rows] - acting, axis=1)
        self._size_V, self._off_V = size, off
        self._most = float(off.max()), float(size.max())

    def bound(self, x_D: FloatArray) -> Bound:
        """How far scores may be from logits.

        Shapes   x_D
        Source   [spec 5 8-bit weights]
        """
        q, scale = quantise_blocks(x_D[None])
        acting = (q * scale[:, :, None].astype(np.float64)).reshape(-1)[: len(x_D)]
        x, off = float(np.linalg.norm(x_D.astype(np.float64))), float(np.linalg.norm(x_D - acting))
        of_score = growth(blocks_of(len(x_D)) + 2) * (x + off)
        of_logit = growth(len(x_D)) * x
        return Bound(self._off_V, self._size_V, x + of_logit, off + of_score + of_logit)

    def logits(self, x_BD: FloatArray, row: int, score_V: FloatArray, count: int) -> FloatArray:
        """The float32 logits of one row where they can be among the `count` largest; else -inf.

        Where count is 1 and the roundings of two logits might decide, all logits of the row, as the
        float32 head gives them.

        x_BD: the backend's, what the head met. score_V: what `weight` made of its row; fewer than all
        tokens, the first ones, if others cannot be drawn.

        Shapes   x_BD, score_V -> logits_V
        Source   [spec 5 8-bit weights]
        """
        x_D = self._ops.to_host(x_BD)[row]
        V = len(score_V)
        bound, count = self.bound(x_D), min(count, V)
        top = (
            np.array([score_V.argmax()])
            if count == 1
            else np.argpartition(score_V, V - count)[V - count :]
        )
        least = (score_V[top] - bound.of(top)).min()
        near = np.flatnonzero(score_V >= least - bound.largest(self._most))
        candidates = near[score_V[near] + bound.of(near) >= least]
        if len(candidates) > V // 2:
            return self._all(x_BD, row)[:V]
        found = self._of(candidates, x_BD[row : row + 1])
        if count == 1 and len(candidates) > 1:
            best = int(np.argmax(found))
            size = (self._size_V + self._off_V)[candidates]
            lost = growth(len(x_D)) * np.linalg.norm(x_D.astype(np.float64)) * size * SLACK + UNDERFLOW
            rivals = found + lost >= found[best] - lost[best]
            if np.count_nonzero(rivals) > 1:
                return self._all(x_BD, row)[:V]
        logits_V: FloatArray = np.full(V, -np.inf, found.dtype)
        logits_V[candidates] = found
        return logits_V

    def _of(self, candidates: IntArray, x_1D: FloatArray) -> FloatArray:
        """The logits of some tokens, in rising order.

        Kernels take several outputs at once, and the last ones in another way. So whole groups are
        multiplied, the head's last one last: then a logit has the bits that it has among all.
        """
        ops, V = self._ops, len(self._size_V)
        groups = np.unique(candidates // GROUP)
        rows = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
        rows = rows[rows < V]
        head = ops.to_device(np.ascontiguousarray(self._output_VD[rows]))
        logits: FloatArray = ops.to_host(ops.linear(x_1D, head, None))[0]
        return logits[np.searchsorted(rows, candidates)]

    def _all(self, x_BD: FloatArray, row: int) -> FloatArray:
        """Every token's logit."""
        logits_BV: FloatArray = self._ops.to_host(self._ops.linear(x_BD, self._output_VD, None))
        return logits_BV[row]
