"""The output head and the loss, fused over chunks of rows: [N, V] logits are never held.

A chunk is computed strip by strip of the vocabulary. While a strip is in cache each row's largest logit
and its sum of exponentials are taken (Milakov and Gimelshein, arXiv 1805.02867); the row's own then
follow from those of its strips. The gradient's two products use the chunk up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import blocks, parallel, task
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.operations.numba_cpu.regions import take_number, workers
from mhmoe_np.types import FloatArray, IntArray

ROWS_OF_TASK = 64  # of the softmax
ROWS_OF_PRODUCT = 512  # of the gradient that goes down
STRIP = 512  # of the vocabulary
CHUNK_BYTES = 32 << 20
CHUNK_ROWS = 256, 1024  # at least and at most


@task
def _strip_of_logits(
    x_ND: Any,
    w_SD: Any,
    first: int,
    target_N: Any,
    at_target_N: Any,
    logits_NS: Any,
    top_N: Any,
    sum_N: Any,
) -> None:
    """Logits of one strip as e^(logit - top), with each row's top and sum there."""
    gemm_nt(1.0, x_ND, w_SD, 0.0, logits_NS)
    S = logits_NS.shape[1]
    for n in range(len(target_N)):
        row_S = side_by_side(logits_NS[n])
        s = target_N[n] - first
        if 0 <= s < S:
            at_target_N[n] = row_S[s]
        top = row_max(row_S, S)
        for v in range(S):
            row_S[v] = exp(row_S[v] - top)
        top_N[n], sum_N[n] = top, row_sum(row_S, S)


@parallel
def _logits(
    x_ND: Any,
    w_VD: Any,
    target_N: Any,
    at_target_N: Any,
    logits_ZNS: Any,
    top_ZN: Any,
    sum_ZN: Any,
) -> None:
    S = logits_ZNS.shape[2]
    for z in prange(len(top_ZN)):
        w_SD = w_VD[z * S : (z + 1) * S]
        logits_NS = logits_ZNS[z, : len(target_N), : len(w_SD)]
        _strip_of_logits(x_ND, w_SD, z * S, target_N, at_target_N, logits_NS, top_ZN[z], sum_ZN[z])


@task
def _nll_of_row(at_target: Any, top_Z: Any, sum_Z: Any, factor_Z: Any) -> Any:
    """The row's NLL; leaves the factors that make each strip's exponentials probabilities."""
    Z = len(top_Z)
    highest = row_max(top_Z, Z)
    total = top_Z.dtype.type(0)
    for z in range(Z):
        factor_Z[z] = exp(top_Z[z] - highest)
        total += sum_Z[z] * factor_Z[z]
    for z in range(Z):
        factor_Z[z] /= total
    return (highest - at_target) + np.log(total)


@task
def _nll_rows(
    first: int,
    last: int,
    target_N: Any,
    at_target_N: Any,
    top_ZN: Any,
    sum_ZN: Any,
    nll_N: Any,
    logits_ZNS: Any,
    keep: bool,
) -> None:
    """NLL of some rows, 0 where uncounted; if `keep`, softmax - onehot(target) in the logits' place."""
    real = nll_N.dtype.type
    Z, _, S = logits_ZNS.shape
    factor_Z = np.empty(Z, nll_N.dtype)
    for n in range(first, last):
        target = target_N[n]
        if target < 0:
            nll_N[n], factor_Z[:] = 0, 0
        else:
            nll_N[n] = _nll_of_row(at_target_N[n], top_ZN[:, n], sum_ZN[:, n], factor_Z)
        if keep:
            for z in range(Z):
                row_S, factor = logits_ZNS[z, n], factor_Z[z]
                for s in range(S):
                    row_S[s] *= factor
            if target >= 0:
                logits_ZNS[target // S, n, target % S] -= real(1)


@parallel
def _nll(
    target_N: Any,
    at_target_N: Any,
    top_ZN: Any,
    sum_ZN: Any,
    nll_N: Any,
    logits_ZNS: Any,
    keep: bool,
    rows: int,
) -> None:
    N = len(target_N)
    for block in prange((N + rows - 1) // rows):
        first = block * rows
        last = min(N, first + rows)
        _nll_rows(first, last, target_N, at_target_N, top_ZN, sum_ZN, nll_N, logits_ZNS, keep)


@task
def _gradient_task(
    i: int, dlogits_ZNS: Any, x_ND: Any, w_VD: Any, dnll: float, dx_ND: Any, dw_VD: Any, rows: int
) -> None:
    """The long tasks first: some rows of dx = dl w; then a strip of dw += dl^T x."""
    N, (Z, _, S) = len(x_ND), dlogits_ZNS.shape
    down = (N + rows - 1) // rows
    if i < down:
        n, m = i * rows, min(N, (i + 1) * rows)
        for z in range(Z):
            w_SD = w_VD[z * S : (z + 1) * S]
            keep = 0.0 if z == 0 else 1.0
            gemm_nn(dnll, dlogits_ZNS[z, n:m, : len(w_SD)], w_SD, keep, dx_ND[n:m])
    else:
        z = i - down
        dw_SD = dw_VD[z * S : (z + 1) * S]
        gemm_tn(dnll, dlogits_ZNS[z, :N, : len(dw_SD)], x_ND, 1.0, dw_SD)


@task
def _gradient_worker(counter: Any, tasks: int, arrays: Any) -> None:
    while True:
        i = take_number(counter)
        if i >= tasks:
            return
        _gradient_task(i, *arrays)


@parallel
def _gradients(workers: int, counter: Any, tasks: int, arrays: Any) -> None:
    for _ in prange(workers):
        _gradient_worker(counter, tasks, arrays)


class Loss(Buffers):
    """See `Operations`: the negative log-likelihood of the targets."""

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        """See `Operations.token_nll`."""
        nll_N: FloatArray = self.empty(target_N.shape, x_ND.dtype)
        with self.scope():
            logits_ZCS = self._chunk(x_ND, w_VD)
            chunk = logits_ZCS.shape[1]
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                self._nll(x_ND[rows], w_VD, target_N[rows], nll_N[rows], logits_ZCS, keep=False)
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
            logits_ZCS = self._chunk(x_ND, w_VD)
            chunk = logits_ZCS.shape[1]
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                self._nll(x_ND[rows], w_VD, target_N[rows], nll_N[rows], logits_ZCS, keep=True)
                arrays = (
                    logits_ZCS,
                    x_ND[rows],
                    w_VD,
                    dnll,
                    dx_ND[rows],
                    dw_VD,
                    ROWS_OF_PRODUCT,
                )
                tasks = blocks(len(x_ND[rows]), ROWS_OF_PRODUCT) + len(logits_ZCS)
                _gradients(*workers(), tasks, arrays)
        return nll_N, dx_ND

    def _nll(
        self,
        x_ND: FloatArray,
        w_VD: FloatArray,
        target_N: IntArray,
        nll_N: FloatArray,
        logits_ZCS: FloatArray,
        *,
        keep: bool,
    ) -> None:
        """One chunk: its NLL; if `keep`, softmax - onehot(target) in logits_ZCS."""
        N, strips = len(x_ND), len(logits_ZCS)
        with self.scope():
            at_target_N = self.empty((N,), x_ND.dtype)
            top_ZN, sum_ZN = (self.empty((strips, N), x_ND.dtype) for _ in range(2))
            _logits(x_ND, w_VD, target_N, at_target_N, logits_ZCS, top_ZN, sum_ZN)
            _nll(target_N, at_target_N, top_ZN, sum_ZN, nll_N, logits_ZCS, keep, ROWS_OF_TASK)

    def _chunk(self, x_ND: FloatArray, w_VD: FloatArray) -> FloatArray:
        """Room for the logits of as many rows as go at once, each strip of the vocabulary by itself."""
        least, most = CHUNK_ROWS
        fitting = CHUNK_BYTES // (len(w_VD) * x_ND.itemsize)
        rows = min(len(x_ND), max(least, min(most, fitting)))
        return self.empty((blocks(len(w_VD), STRIP), rows, min(STRIP, len(w_VD))), x_ND.dtype)
