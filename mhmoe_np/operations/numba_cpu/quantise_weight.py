"""BitNet's weights: integers and a scale for each matrix.

The mean is that of the exact sum, rounded once, so that it has the definition's bits; everything here
rounds as written but for `_quick_sum`, whose error is bounded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact, reduction
from mhmoe_np.operations.numba_cpu.regions import ELEMENT_MACS, run, tasks_of
from mhmoe_np.operations.table import Quantization
from mhmoe_np.types import FloatArray


@exact
def _sum(x_OI: Any, magnitudes: bool) -> Any:
    """The sum of x, or of |x|, as two floats of which the second is what rounding loses of the first.

    Each column keeps its sum in two floats, high + low; the error of an addition is recovered exactly
    (Knuth's two-sum).
    """
    outputs, inputs = x_OI.shape
    high_I, low_I = np.zeros(inputs), np.zeros(inputs)
    for o in range(outputs):
        x_I = x_OI[o]
        for i in range(inputs):
            x = np.float64(abs(x_I[i]) if magnitudes else x_I[i])
            high = high_I[i]
            total = high + x
            part = total - high
            low_I[i] += (high - (total - part)) + (x - part)
            high_I[i] = total
    total, rest = 0.0, 0.0
    for i in range(inputs):
        high = total
        total = high + high_I[i]
        part = total - high
        rest += (high - (total - part)) + (high_I[i] - part) + low_I[i]
    return total, rest


@exact
def _mean_is_certain(w_OI: Any, total: float, rest: float, lost: float) -> Any:
    """Whether the mean of w comes out the same wherever the sum lies within total + rest +- lost.

    Never where a number is not finite: then the ends are NaN.
    """
    real = w_OI.dtype.type
    least, most = total + (rest - lost), total + (rest + lost)
    return real(least / w_OI.size) == real(most / w_OI.size)


@reduction
def _quick_sum(x_I: Any) -> float:
    """The sum of |x| in float64, in any order."""
    total = 0.0
    for i in range(len(x_I)):
        total += np.float64(abs(x_I[i]))
    return total


class MatrixSums(NamedTuple):
    """The sums behind the means, a matrix a task."""

    w_OI: Any
    starts: Any  # the rows at which matrices start, and their number
    ternary: bool  # no sum w: the integers are not centred
    sums_X2: Any  # written: sum |w|, sum w
    certain_X: Any  # written: whether both means are


@tasks_of(MatrixSums, exact)
def _sums_of_matrix(i: int, a: Any) -> None:
    """In n additions a float64 loses less than n 2^-53 sum |w|, two floats n 2^-104 sum |w|.

    Where even that could decide the rounding of a mean, somebody must add exactly.
    """
    w_OI = a.w_OI[a.starts[i] : a.starts[i + 1]]
    total, rest = 0.0, 0.0
    for o in range(w_OI.shape[0]):
        total += _quick_sum(w_OI[o])
    certain = _mean_is_certain(w_OI, total, rest, w_OI.size * 2.0**-52 * total)
    if not certain:
        total, rest = _sum(w_OI, True)
        lost = (w_OI.shape[0] + w_OI.shape[1]) * 2.0**-104 * total
        certain = _mean_is_certain(w_OI, total, rest, lost)
    a.sums_X2[i, 0] = total + rest
    if not a.ternary:
        lost = (w_OI.shape[0] + w_OI.shape[1]) * 2.0**-104 * total
        total, rest = _sum(w_OI, False)
        a.sums_X2[i, 1] = total + rest
        certain = certain and _mean_is_certain(w_OI, total, rest, lost)
    a.certain_X[i] = certain


class QuantisedMatrices(NamedTuple):
    """The quantisation itself, a matrix a task."""

    w_OI: Any
    starts: Any
    ternary: bool
    sums_X2: Any  # sum |w|, sum w
    q_OI: Any  # overwritten; before: the integers until now
    beta_O: Any  # written
    report_X5: Any  # written: beta, how many of -1, 0 and +1, how many changed


@tasks_of(QuantisedMatrices, exact)
def _quantise_matrix(i: int, a: Any) -> None:
    """Integers, scale and report of matrix i, whose means are known."""
    real, ternary = a.w_OI.dtype.type, a.ternary
    first, end = a.starts[i], a.starts[i + 1]
    size = (end - first) * a.w_OI.shape[1]
    beta = real(a.sums_X2[i, 0] / size)
    if beta < real(1e-5):  # NaN stays
        beta = real(1e-5)
    middle = real(0) if ternary else real(a.sums_X2[i, 1] / size)
    inverse = real(1) / beta
    minus, plus, flipped = 0, 0, 0
    for o in range(first, end):
        w_I, q_I = a.w_OI[o], a.q_OI[o]
        for j in range(len(w_I)):
            if ternary:
                q = min(max(np.rint(w_I[j] * inverse), real(-1)), real(1))  # NaN stays
            else:
                q = real(1) if w_I[j] - middle > real(0) else real(-1)
            flipped += q != q_I[j]
            minus += q < real(0)
            plus += q > real(0)
            q_I[j] = q
        a.beta_O[o] = beta
    zero = size - minus - plus if beta == beta else 0
    report = a.report_X5[i]
    report[0], report[1], report[2], report[3], report[4] = beta, minus, zero, plus, flipped


class QuantiseWeight(Buffers):
    """See `Operations`: quantisation of weights."""

    def quantise_weight(
        self,
        w_OI: FloatArray,
        starts: tuple[int, ...],
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
        report_X5: FloatArray,
    ) -> None:
        """See `Operations.quantise_weight`. A task for each matrix."""
        matrices, ternary = len(starts) - 1, quantization == "bitnet_b158"
        first_rows = np.array(starts)
        sums_X2, certain_X = np.zeros((matrices, 2)), np.empty(matrices, np.bool_)
        to_sum = MatrixSums(w_OI, first_rows, ternary, sums_X2, certain_X)
        run(to_sum, matrices, macs=w_OI.size * ELEMENT_MACS)
        for x in np.flatnonzero(~certain_X):
            sums_X2[x] = _exact_sums(w_OI[starts[x] : starts[x + 1]], ternary)
        to_quantise = QuantisedMatrices(w_OI, first_rows, ternary, sums_X2, q_OI, beta_O, report_X5)
        run(to_quantise, matrices, macs=w_OI.size * ELEMENT_MACS)


def _exact_sums(w_OI: FloatArray, ternary: bool) -> tuple[float, float]:
    """sum |w| and, where it is wanted, sum w, each rounded once; NaN where a number is not finite."""
    if not np.isfinite(w_OI).all():
        return math.nan, math.nan
    total = 0.0 if ternary else math.fsum(w_OI.ravel().tolist())
    return math.fsum(np.abs(w_OI).ravel().tolist()), total
