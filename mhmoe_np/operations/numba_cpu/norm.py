"""RMSNorm, a block of rows a task."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    block,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.types import FloatArray


@task
def norm_rows(x_ND: Any, w_D: Any, eps: float, y_ND: Any, rstd_N: Any) -> None:
    """y = x * rstd * w, row by row; y_ND may be x_ND."""
    real = x_ND.dtype.type
    D = x_ND.shape[1]
    for n in range(x_ND.shape[0]):
        x_D, y_D = x_ND[n], y_ND[n]
        rstd = real(1) / np.sqrt(row_dot(x_D, x_D) / real(D) + real(eps))
        rstd_N[n] = rstd
        for d in range(D):
            y_D[d] = x_D[d] * rstd * w_D[d]


@task
def norm_rows_backward(
    dy_ND: Any, x_ND: Any, w_D: Any, rstd_N: Any, dx_ND: Any, dw_D: Any, onto: bool
) -> None:
    """dx = rstd (dn - n mean(dn n)) with n = x rstd, dn = dy w; adds dy n to dw_D.

    onto: add to dx_ND; otherwise it may hold anything, and may be dy_ND.
    """
    real = x_ND.dtype.type
    D = x_ND.shape[1]
    dn_D = np.empty(D, x_ND.dtype)
    for n in range(x_ND.shape[0]):
        dy_D, x_D, dx_D = dy_ND[n], x_ND[n], dx_ND[n]
        rstd = rstd_N[n]
        for d in range(D):
            dw_D[d] += dy_D[d] * x_D[d] * rstd
            dn_D[d] = dy_D[d] * w_D[d]
        pull = row_dot(dn_D, x_D) * rstd * rstd / real(D)
        if onto:
            for d in range(D):
                dx_D[d] += rstd * (dn_D[d] - x_D[d] * pull)
        else:
            for d in range(D):
                dx_D[d] = rstd * (dn_D[d] - x_D[d] * pull)


class NormRows(NamedTuple):
    """RMSNorm, a block of rows a task."""

    x_ND: Any
    w_D: Any
    eps: float
    y_ND: Any
    rstd_N: Any


@tasks_of(NormRows)
def _norm(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    norm_rows(a.x_ND[rows], a.w_D, a.eps, a.y_ND[rows], a.rstd_N[rows])


class NormSums(NamedTuple):
    """sum += x, and RMSNorm of that, a block of rows a task."""

    x_ND: Any
    sum_ND: Any
    w_D: Any
    eps: float
    y_ND: Any
    rstd_N: Any


@tasks_of(NormSums)
def _add_and_norm(i: int, a: Any) -> None:
    first = i * ROWS_ELEMENTWISE
    for n in range(first, min(first + ROWS_ELEMENTWISE, len(a.x_ND))):
        x_D, sum_D = a.x_ND[n], a.sum_ND[n]
        for d in range(len(x_D)):
            sum_D[d] += x_D[d]
        row = slice(n, n + 1)
        norm_rows(a.sum_ND[row], a.w_D, a.eps, a.y_ND[row], a.rstd_N[row])


class NormRowsBackward(NamedTuple):
    """The backward of `NormRows`: each task sums up a dw of its own."""

    dy_ND: Any
    x_ND: Any
    w_D: Any
    rstd_N: Any
    dx_ND: Any
    dw_of_tasks: Any  # [tasks, D]
    onto: bool


@tasks_of(NormRowsBackward)
def _norm_backward(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    norm_rows_backward(
        a.dy_ND[rows], a.x_ND[rows], a.w_D, a.rstd_N[rows], a.dx_ND[rows], a.dw_of_tasks[i], a.onto
    )


class Norm(Buffers):
    """See `Operations`: RMSNorm."""

    def rms_norm(
        self, x_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.rms_norm`."""
        y_ND, rstd_N = self.empty(x_ND.shape, x_ND.dtype), self.empty(x_ND.shape[:1], x_ND.dtype)
        tasks = blocks(len(x_ND), ROWS_ELEMENTWISE)
        run(NormRows(x_ND, w_D, eps, y_ND, rstd_N), tasks, macs=x_ND.size * ELEMENT_MACS)
        return y_ND, rstd_N

    def add_in_place_and_norm(
        self, x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.add_in_place_and_norm`."""
        y_ND, rstd_N = self.empty(x_ND.shape, x_ND.dtype), self.empty(x_ND.shape[:1], x_ND.dtype)
        tasks = blocks(len(x_ND), ROWS_ELEMENTWISE)
        run(NormSums(x_ND, branch_ND, w_D, eps, y_ND, rstd_N), tasks, macs=x_ND.size * ELEMENT_MACS)
        return y_ND, rstd_N

    def rms_norm_backward(
        self,
        dy_ND: FloatArray,
        x_ND: FloatArray,
        w_D: FloatArray,
        rstd_N: FloatArray,
        dw_D: FloatArray,
        *,
        onto_ND: FloatArray | None = None,
    ) -> FloatArray:
        """See `Operations.rms_norm_backward`. The tasks' dw add up in order."""
        dx_ND: FloatArray = self.empty(x_ND.shape, x_ND.dtype) if onto_ND is None else onto_ND
        tasks = blocks(len(x_ND), ROWS_ELEMENTWISE)
        dw_of_tasks = np.zeros((tasks, len(w_D)), x_ND.dtype)
        arrays = dy_ND, x_ND, w_D, rstd_N, dx_ND, dw_of_tasks
        run(NormRowsBackward(*arrays, onto_ND is not None), tasks, macs=x_ND.size * ELEMENT_MACS)
        dw_D += dw_of_tasks.sum(axis=0)
        return dx_ND
