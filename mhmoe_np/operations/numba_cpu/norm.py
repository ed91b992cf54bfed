"""RMSNorm, a block of rows a task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import row_dot
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import ROWS_ELEMENTWISE, blocks, parallel, task
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
    dy_ND: Any, x_ND: Any, w_D: Any, rstd_N: Any, dx_ND: Any, dw_D: Any, keep: float
) -> None:
    """dx = keep dx + rstd (dn - n mean(dn n)) with n = x rstd, dn = dy w; adds dy n to dw_D.

    keep is 1, or 0: then dx_ND may hold anything.
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
        if keep == 0.0:
            for d in range(D):
                dx_D[d] = rstd * (dn_D[d] - x_D[d] * pull)
        else:
            for d in range(D):
                dx_D[d] += rstd * (dn_D[d] - x_D[d] * pull)


@task
def _add_and_norm_rows(x_ND: Any, sum_ND: Any, w_D: Any, eps: float, y_ND: Any, rstd_N: Any) -> None:
    for n in range(x_ND.shape[0]):
        x_D, sum_D = x_ND[n], sum_ND[n]
        for d in range(len(x_D)):
            sum_D[d] += x_D[d]
        norm_rows(sum_ND[n : n + 1], w_D, eps, y_ND[n : n + 1], rstd_N[n : n + 1])


@parallel
def _add_and_norm(
    x_ND: Any, sum_ND: Any, w_D: Any, eps: float, y_ND: Any, rstd_N: Any, rows: int
) -> None:
    for block in prange((x_ND.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        _add_and_norm_rows(x_ND[n:z], sum_ND[n:z], w_D, eps, y_ND[n:z], rstd_N[n:z])


@parallel
def _norm(x_ND: Any, w_D: Any, eps: float, y_ND: Any, rstd_N: Any, rows: int) -> None:
    for block in prange((x_ND.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        norm_rows(x_ND[n:z], w_D, eps, y_ND[n:z], rstd_N[n:z])


@parallel
def _norm_backward(
    dy_ND: Any,
    x_ND: Any,
    w_D: Any,
    rstd_N: Any,
    dx_ND: Any,
    dw_blocks: Any,
    keep: float,
    rows: int,
) -> None:
    for block in prange((x_ND.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        norm_rows_backward(dy_ND[n:z], x_ND[n:z], w_D, rstd_N[n:z], dx_ND[n:z], dw_blocks[block], keep)


class Norm(Buffers):
    """See `Operations`: RMSNorm."""

    def rms_norm(
        self, x_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.rms_norm`."""
        y_ND, rstd_N = self.empty(x_ND.shape, x_ND.dtype), self.empty(x_ND.shape[:1], x_ND.dtype)
        if len(x_ND) <= ROWS_ELEMENTWISE:
            norm_rows(x_ND, w_D, eps, y_ND, rstd_N)
        else:
            _norm(x_ND, w_D, eps, y_ND, rstd_N, ROWS_ELEMENTWISE)
        return y_ND, rstd_N

    def add_in_place_and_norm(
        self, x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.add_in_place_and_norm`."""
        y_ND, rstd_N = self.empty(x_ND.shape, x_ND.dtype), self.empty(x_ND.shape[:1], x_ND.dtype)
        if len(x_ND) <= ROWS_ELEMENTWISE:
            _add_and_norm_rows(x_ND, branch_ND, w_D, eps, y_ND, rstd_N)
        else:
            _add_and_norm(x_ND, branch_ND, w_D, eps, y_ND, rstd_N, ROWS_ELEMENTWISE)
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
        """See `Operations.rms_norm_backward`. Each block sums its own dw; blocks add up in order."""
        keep = 0.0 if onto_ND is None else 1.0
        dx_ND: FloatArray = self.empty(x_ND.shape, x_ND.dtype) if onto_ND is None else onto_ND
        dw_blocks = np.zeros((blocks(len(x_ND), ROWS_ELEMENTWISE), len(w_D)), x_ND.dtype)
        _norm_backward(dy_ND, x_ND, w_D, rstd_N, dx_ND, dw_blocks, keep, ROWS_ELEMENTWISE)
        dw_D += dw_blocks.sum(axis=0)
        return dx_ND
