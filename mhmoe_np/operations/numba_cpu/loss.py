"""The output head and the loss, fused over chunks of rows: [N, V] logits are never held.

A chunk is computed strip by strip of the vocabulary. While a strip is in cache each row's largest logit
and its sum of exponentials are taken (Milakov and Gimelshein, arXiv 1805.02867); the row's own then
follow from those of its strips. The gradient's two products use the chunk up.

The V of an array of one strip is the strip's width, which all strips have but the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.operations.numba_cpu.regions import ELEMENT_MACS, block, blocks, run, tasks_of
from mhmoe_np.types import FloatArray, IntArray

ROWS_OF_TASK = 64  # of the softmax
ROWS_OF_PRODUCT = 512  # of the gradient that goes down
STRIP = 512  # of the vocabulary
CHUNK_BYTES = 32 << 20
CHUNK_ROWS = 256, 1024  # at least and at most


class Exponentials(NamedTuple):
    """Logits as e^(logit - top), with each row's top and sum in each strip: a strip a task."""

    x_ND: Any
    w_VD: Any
    target_N: Any
    at_target_N: Any  # the targets' logits
    e_strips: Any  # [strips, N, V]
    tops: Any  # [strips, N]
    sums: Any  # [strips, N]


@tasks_of(Exponentials)
def _exponentials(i: int, a: Any) -> None:
    N, width = len(a.target_N), a.e_strips.shape[2]
    w_VD = a.w_VD[block(i, width)]
    V = len(w_VD)
    e_NV = a.e_strips[i, :N, :V]
    gemm_nt(1.0, a.x_ND, w_VD, 0.0, e_NV)
    for n in range(N):
        e_V = side_by_side(e_NV[n])
        target = a.target_N[n] - i * width
        if 0 <= target < V:
            a.at_target_N[n] = e_V[target]
        top = row_max(e_V, V)
        for v in range(V):
            e_V[v] = exp(e_V[v] - top)
        a.tops[i, n], a.sums[i, n] = top, row_sum(e_V, V)


class RowLosses(NamedTuple):
    """Each row's NLL from its strips, 0 where uncounted: a block of rows a task.

    gradient: make softmax - onehot(target) of e_strips.
    """

    target_N: Any
    at_target_N: Any
    tops: Any
    sums: Any
    nll_N: Any
    e_strips: Any
    gradient: bool


@task
def _nll_of_row(at_target: Any, tops: Any, sums: Any, factors: Any) -> Any:
    """The row's NLL; leaves the factors that make each strip's exponentials probabilities."""
    strips = len(tops)
    highest = row_max(tops, strips)
    total = tops.dtype.type(0)
    for strip in range(strips):
        factors[strip] = exp(tops[strip] - highest)
        total += sums[strip] * factors[strip]
    for strip in range(strips):
        factors[strip] /= total
    return (highest - at_target) + np.log(total)


@tasks_of(RowLosses)
def _nll(i: int, a: Any) -> None:
    strips, _, width = a.e_strips.shape
    factors = np.empty(strips, a.nll_N.dtype)
    first = i * ROWS_OF_TASK
    for n in range(first, min(first + ROWS_OF_TASK, len(a.target_N))):
        target = a.target_N[n]
        if target < 0:
            a.nll_N[n], factors[:] = 0, 0
        else:
            a.nll_N[n] = _nll_of_row(a.at_target_N[n], a.tops[:, n], a.sums[:, n], factors)
        if a.gradient:
            for strip in range(strips):
                e_V, factor = a.e_strips[strip, n], factors[strip]
                for v in range(width):
                    e_V[v] *= factor
            if target >= 0:
                a.e_strips[target // width, n, target % width] -= 1


class LossGradients(NamedTuple):
    """dx = dl w, some rows a task, and dw += dl^T x, a strip a task; dl = dnll * dlogits."""

    dlogits_strips: Any
    x_ND: Any
    w_VD: Any
    dnll: float
    dx_ND: Any
    dw_VD: Any


@tasks_of(LossGradients)
def _gradients(i: int, a: Any) -> None:
    """The long tasks first."""
    N, (strips, _, width) = len(a.x_ND), a.dlogits_strips.shape
    down = blocks(N, ROWS_OF_PRODUCT)
    if i < down:
        first, last = i * ROWS_OF_PRODUCT, min(N, (i + 1) * ROWS_OF_PRODUCT)
        for strip in range(strips):
            w_VD = a.w_VD[block(strip, width)]
            beta = 0.0 if strip == 0 else 1.0
            dlogits_NV = a.dlogits_strips[strip, first:last, : len(w_VD)]
            gemm_nn(a.dnll, dlogits_NV, w_VD, beta, a.dx_ND[first:last])
    else:
        strip = i - down
        dw_VD = a.dw_VD[block(strip, width)]
        gemm_tn(a.dnll, a.dlogits_strips[strip, :N, : len(dw_VD)], a.x_ND, 1.0, dw_VD)


class Loss(Buffers):
    """See `Operations`: the negative log-likelihood of the targets."""

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        """See `Operations.token_nll`."""
        nll_N: FloatArray = self.empty(target_N.shape, x_ND.dtype)
        with self.scope():
            e_strips = self._chunk(x_ND, w_VD)
            chunk = e_strips.shape[1]
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                self._nll(x_ND[rows], w_VD, target_N[rows], nll_N[rows], e_strips, gradient=False)
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
            e_strips = self._chunk(x_ND, w_VD)
            chunk = e_strips.shape[1]
            for n in range(0, len(x_ND), chunk):
                rows = slice(n, n + chunk)
                self._nll(x_ND[rows], w_VD, target_N[rows], nll_N[rows], e_strips, gradient=True)
                region = LossGradients(e_strips, x_ND[rows], w_VD, dnll, dx_ND[rows], dw_VD)
                tasks = blocks(len(x_ND[rows]), ROWS_OF_PRODUCT) + len(e_strips)
                run(region, tasks, macs=2 * x_ND[rows].size * len(w_VD))
        return nll_N, dx_ND

    def _nll(
        self,
        x_ND: FloatArray,
        w_VD: FloatArray,
        target_N: IntArray,
        nll_N: FloatArray,
        e_strips: FloatArray,
        *,
        gradient: bool,
    ) -> None:
        """One chunk: its NLL; softmax - onehot(target) in e_strips if that is wanted."""
        N, strips = len(x_ND), len(e_strips)
        with self.scope():
            at_target_N = self.empty((N,), x_ND.dtype)
            tops, sums = (self.empty((strips, N), x_ND.dtype) for _ in range(2))
            exponentials = Exponentials(x_ND, w_VD, target_N, at_target_N, e_strips, tops, sums)
            run(exponentials, strips, macs=x_ND.size * len(w_VD))
            losses = RowLosses(target_N, at_target_N, tops, sums, nll_N, e_strips, gradient)
            touched = N * len(w_VD) if gradient else N * strips
            run(losses, blocks(N, ROWS_OF_TASK), macs=touched * ELEMENT_MACS)

    def _chunk(self, x_ND: FloatArray, w_VD: FloatArray) -> FloatArray:
        """Room for the logits of as many rows as go at once, each strip of the vocabulary by itself."""
        least, most = CHUNK_ROWS
        fitting = CHUNK_BYTES // (len(w_VD) * x_ND.itemsize)
        rows = min(len(x_ND), max(least, min(most, fitting)))
        return self.empty((blocks(len(w_VD), STRIP), rows, min(STRIP, len(w_VD))), x_ND.dtype)
