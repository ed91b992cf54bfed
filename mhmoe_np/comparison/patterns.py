"""What a tensor that differs looks like beside the right one: mistakes that numbers alone give away.

Everything here looks at two tensors and knows nothing of the model; see `hypotheses` for what does.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.comparison.difference import Tensor

MOST_ROWS = 4096  # of which every pair is compared


def pattern(theirs: Tensor, ours: Tensor, *, tolerance: float) -> str | None:
    """What turns `ours` into `theirs`, in words that follow "it is"; None: nothing that is known here.

    Tensors of one size; integers or floats.
    """
    if ours.size < 2 or not (np.isfinite(theirs).all() and np.isfinite(ours).all()):
        return None
    a, b = theirs.astype(np.float64), ours.astype(np.float64)
    close = tolerance * max(np.abs(a).max(), np.abs(b).max())
    if not a.any():
        return "0 everywhere"
    if a.shape != b.shape and a.shape != b.shape[::-1]:
        return None
    if b.ndim >= 2 and a.shape == b.shape[::-1] and _near(a, b.T, close):
        return "ours transposed"
    if a.shape != b.shape:
        return None
    if b.any():
        factor = float(np.vdot(b, a) / np.vdot(b, b))
        if _near(a, factor * b, close):
            return f"ours times {factor:.6g}{_known(factor)}"
    if b.ndim < 2:
        order = _order(a[:, None], b[:, None], close)
        return None if order is None else f"ours with its elements {_described(order)}"
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    for one, other, axis in ((rows_a, rows_b, "rows"), (rows_a.T, rows_b.T, "columns")):
        order = _order(one, other, close)
        if order is not None:
            return f"ours with its {axis} {_described(order)}"
    if len(rows_b) > 1 and _near(rows_a[1:], rows_b[:-1], close):
        return "ours, one row later"
    if len(rows_b) > 1 and _near(rows_a[:-1], rows_b[1:], close):
        return "ours, one row earlier"
    offset = (rows_a - rows_b).mean(axis=0)
    if len(rows_b) > 1 and _near(rows_a, rows_b + offset, close):
        return "ours plus one vector in every row, as by a bias that one of the two lacks"
    return _where(rows_a, rows_b, close)


def _near(a: Tensor, b: Tensor, close: float) -> bool:
    return bool(np.abs(a - b).max() <= close)


def _known(factor: float) -> str:
    """The root that a factor may be."""
    for square, shown in ((factor**2, "sqrt({})"), (factor**-2, "1/sqrt({})")):
        number = round(square)
        if factor > 0 and 2 <= number <= 1 << 20 and math.isclose(square, number, rel_tol=1e-6):
            return f" = {shown.format(number)}"
    return ""


def _where(rows_a: Tensor, rows_b: Tensor, close: float) -> str | None:
    """Where the differences are, if they are in few rows or columns."""
    off = np.abs(rows_a - rows_b) > close
    for axis, bad in (("row", off.any(axis=1)), ("column", off.any(axis=0))):
        found = np.flatnonzero(bad)
        if 0 < len(found) <= len(bad) // 2:
            shown = ", ".join(map(str, found[:6])) + (", ..." if len(found) > 6 else "")
            return f"ours but for {len(found)} of {len(bad)} {axis}s ({shown})"
    return None


def _order(a: Tensor, b: Tensor, close: float) -> NDArray[np.intp] | None:
    """The permutation with a = b[order], if there is one; the identity counts as none."""
    count = len(b)
    if not 2 <= count <= MOST_ROWS:
        return None
    # Rows that are equal have equal sums of any weights; what those propose is then looked at in full.
    weights = np.cos(np.arange(1, a.shape[1] + 1))
    key_a, key_b = a @ weights, b @ weights
    order = np.empty(count, np.intp)
    order[np.argsort(key_a, kind="stable")] = np.argsort(key_b, kind="stable")
    if np.array_equal(order, np.arange(count)) or not _near(a, b[order], close):
        return None
    return order


def _described(order: NDArray[np.intp]) -> str:
    """What a permutation is called."""
    count = len(order)
    identity = np.arange(count)
    moved = np.flatnonzero(order != identity)
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} exchanged"
    if count % 2 == 0 and np.array_equal(order, np.roll(identity, count // 2)):
        return "in exchanged halves"
    if np.array_equal(order, identity[::-1]):
        return "in reverse"
    for parts in range(2, count // 2 + 1):
        if count % parts == 0 and np.array_equal(
            order, identity.reshape(parts, count // parts).T.ravel()
        ):
            return f"interleaved: one from each of {parts} equal parts, in turn"
    for shift in (1, -1):
        if np.array_equal(order, np.roll(identity, shift)):
            return f"moved round by {shift}"
    if np.array_equal(order, sorted(identity, key=str)):
        return 'sorted as strings ("10" before "2")'
    return f"permuted: {', '.join(map(str, order[:8]))}{', ...' if count > 8 else ''}"
