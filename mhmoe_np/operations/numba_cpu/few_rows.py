"""Products of few rows, dot by dot: the weights are read once, in the order in which they lie.

BLAS would first copy the whole matrix into an order of its own. Four outputs at a time share each load
of an input, and two rows of inputs each load of a weight. An output's bits depend on its place among
the four, on its row's among the two and on the number of rows, never on how the outputs are cut into
tasks, as long as every task begins at a multiple of four.
"""

from __future__ import annotations

from typing import Any

from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.compiling import reduction, task

# Up to so many inputs a single row meets one output after the other: four at once are read at four
# places, which processors foresee only where each goes on for long. On an AMD EPYC with AVX2, from
# memory, GB/s one by one against four at once: 21.7 and 13.8 for 256 inputs, 20.1 and 16.7 for 576,
# 21.1 and 19.8 for 768, but 20.1 and 22.0 for 1,536 (a sum over all: 19.5).
SHORT_INPUTS = 1024


@reduction
def four_dots(x_I: Any, first_I: Any, second_I: Any, third_I: Any, fourth_I: Any) -> Any:
    """The inner products of a row with four others."""
    a = b = c = d = x_I.dtype.type(0)
    for i in range(len(x_I)):
        a += first_I[i] * x_I[i]
        b += second_I[i] * x_I[i]
        c += third_I[i] * x_I[i]
        d += fourth_I[i] * x_I[i]
    return a, b, c, d


@reduction
def _two_by_four(
    x_I: Any, next_I: Any, first_I: Any, second_I: Any, third_I: Any, fourth_I: Any
) -> Any:
    """Those of two rows with the same four."""
    a = b = c = d = e = f = g = h = x_I.dtype.type(0)
    for i in range(len(x_I)):
        a += first_I[i] * x_I[i]
        b += second_I[i] * x_I[i]
        c += third_I[i] * x_I[i]
        d += fourth_I[i] * x_I[i]
        e += first_I[i] * next_I[i]
        f += second_I[i] * next_I[i]
        g += third_I[i] * next_I[i]
        h += fourth_I[i] * next_I[i]
    return a, b, c, d, e, f, g, h


@task
def few_rows_nt(x_NI: Any, w_OI: Any, y_NO: Any) -> None:
    """y = x w^T."""
    rows, outputs = y_NO.shape
    pairs, fours = rows // 2 * 2, outputs // 4 * 4
    if rows == 1 and x_NI.shape[1] <= SHORT_INPUTS:
        fours = 0
    for o in range(0, fours, 4):
        first_I, second_I, third_I, fourth_I = w_OI[o], w_OI[o + 1], w_OI[o + 2], w_OI[o + 3]
        for n in range(0, pairs, 2):
            dots = _two_by_four(x_NI[n], x_NI[n + 1], first_I, second_I, third_I, fourth_I)
            y_NO[n, o], y_NO[n, o + 1], y_NO[n, o + 2], y_NO[n, o + 3] = dots[:4]
            y_NO[n + 1, o], y_NO[n + 1, o + 1], y_NO[n + 1, o + 2], y_NO[n + 1, o + 3] = dots[4:]
        for n in range(pairs, rows):
            dots = four_dots(x_NI[n], first_I, second_I, third_I, fourth_I)
            y_NO[n, o], y_NO[n, o + 1], y_NO[n, o + 2], y_NO[n, o + 3] = dots
    for o in range(fours, outputs):
        for n in range(rows):
            y_NO[n, o] = row_dot(w_OI[o], x_NI[n])
