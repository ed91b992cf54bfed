"""The output head and the loss, fused over chunks of rows: [N, V] logits are never held.

A chunk of logits stays in cache between its product, its softmax and the products that use it up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_max, row_sum
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import parallel, task
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.types import FloatArray, IntArray

ROWS_OF_TASK = 128
CHUNK_BYTES = 16 << 20
VOCABULARY_STRIP = 512  # rows of dw_VD that one task adds to


@task
def _nll_rows(logits_NV: Any, target_N: Any, nll_N: Any) -> None:
    """NLL of each row; turns logits into softmax - onehot(target), 0 where uncounted."""
    real = logits_NV.dtype.type
    V = logits_NV.shape[1]
    for n in range(len(target_N)):
        row_V, target = logits_NV[n], target_N[n]
        if target < 0:
            nll_N[n] = 0
            row_V[:] = 0
            continue
        highest = row_max(row_V, V)
        at_target = row_V[target]
        for v in range(V):
            row_V[v] = exp(row_V[v] - highest)
        total = row_sum(row_V, V)
        nll_N[n] = (highest - at_target) + np.log(total)
        inverse = real(1) / total
        for v in range(V):
            row_V[v] *= inverse
        row_V[target] -= real(1)


@parallel
def _nll(x_ND: Any, w_VD: Any, target_N: Any, logits_NV: Any, nll_N: Any, rows: int) -> None:
    for block in prange((len(target_N) + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        gemm_nt(1.0, x_ND[n:z], w_VD, 0.0, logits_NV[n:z])
        _nll_rows(logits_NV[n:z], target_N[n:z], nll_N[n:z])


@parallel
def _gradients(
    dlogits_NV: Any,
    x_ND: Any,
    w_VD: Any,
    dnll: float,
    dx_ND: Any,
    dw_VD: Any,
    rows: int,
    strip: int,
) -> None:
    row_tasks = (dx_ND.shape[0] + rows - 1) // rows
    strips = (w_VD.shape[0] + strip - 1) // strip
    for i in prange(row_tasks + strips):
        if i < row_tasks:
            n, z = i * rows, (i + 1) * rows
            gemm_nn(dnll, dlogits_NV[n:z], w_VD, 0.0, dx_ND[n:z])
        else:
            v = (i - row_tasks) * strip
            gemm_tn(dnll, dlogits_NV[:, v : v + strip], x_ND, 1.0, dw_VD[v : v + strip])


class Loss(Buffers):
    """See `Operations`: the negative log-likelihood of the targets."""

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        """See `Operations.token_nll`."""
        nll_N: FloatArray = self.empty(target_N.shape, x_ND.dtype)
        with self.scope():
            chunk, logits_CV = self._chunk(x_ND, w_VD)
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                _nll(x_ND[rows], w_VD, target_N[rows], logits_CV, nll_N[rows], ROWS_OF_TASK)
        return nll_N

    def token_nll_and_gradient(
        self,
        x_ND: FloatArray,
        w_VD: FloatArray,
        target_N: IntArray,
        dw_VD: FloatArray,
        *,
        dnll: float,
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.token_nll_and_gradient`."""
        nll_N = self.empty(target_N.shape, x_ND.dtype)
        dx_ND = self.empty(x_ND.shape, x_ND.dtype)
        with self.scope():
            chunk, logits = self._chunk(x_ND, w_VD)
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                logits_NV = logits[: len(x_ND[rows])]
                _nll(x_ND[rows], w_VD, target_N[rows], logits_NV, nll_N[rows], ROWS_OF_TASK)
                _gradients(
                    logits_NV,
                    x_ND[rows],
                    w_VD,
                    dnll,
                    dx_ND[rows],
                    dw_VD,
                    ROWS_OF_TASK,
                    VOCABULARY_STRIP,
                )
        return nll_N, dx_ND

    def _chunk(self, x_ND: FloatArray, w_VD: FloatArray) -> tuple[int, FloatArray]:
        """How many rows go at once, and room for their logits."""
        row_bytes = len(w_VD) * x_ND.itemsize
        tasks = max(2, CHUNK_BYTES // (row_bytes * ROWS_OF_TASK))
        rows = min(len(x_ND), tasks * ROWS_OF_TASK)
        return rows, self.empty((rows, len(w_VD)), x_ND.dtype)
