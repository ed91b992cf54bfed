"""The output head and the loss, by chunks of rows: [N, V] logits are never held."""

from __future__ import annotations

from collections.abc import Iterator

from mhmoe_np.operations.cuda.device import Kernels, threads_of_row
from mhmoe_np.operations.cuda.linear import Products
from mhmoe_np.types import FloatArray, IntArray

# Of the logits of a chunk. Every chunk reads and writes dw once more, which takes less time than its
# products once it has some hundred rows.
CHUNK_BYTES = 256 << 20
CHUNK_ROWS = 128  # a chunk has a multiple of these: whole tiles
KERNELS = Kernels("loss")


class Loss(Products):
    """See `Operations`: the negative log-likelihood of the targets."""

    def token_nll(self, x_ND: FloatArray, w_VD: FloatArray, target_N: IntArray) -> FloatArray:
        """See `Operations.token_nll`.

        Work 2 N D V FLOP; moves 4 (N D + V D + 2 N V) bytes: bound by arithmetic.
        """
        nll_N: FloatArray = self.empty(target_N.shape, x_ND.dtype)
        with self.scope():
            split = self._splits(x_ND)
            w, logits_NV = self._operand(w_VD, split=split), self._chunk(x_ND, w_VD)
            for rows in _chunks(x_ND, logits_NV):
                with self.scope():
                    part_NV = logits_NV[: len(x_ND[rows])]
                    x = self._operand(x_ND[rows], split=split)
                    self._multiply(x, w, part_NV, transpose_b=True)
                    _nll(part_NV, target_N[rows], nll_N[rows], dnll=None)
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
        """See `Operations.token_nll_and_gradient`.

        dx = dl @ w;  dw = dl^T @ x. Work 6 N D V FLOP; moves 4 (2 N D + V D + 5 N V) bytes, and
        8 V D for dw once more in every chunk: bound by arithmetic.
        """
        nll_N, dx_ND = self.empty(target_N.shape, x_ND.dtype), self.empty(x_ND.shape, x_ND.dtype)
        with self.scope():
            split = self._splits(x_ND)
            w, logits_NV = self._operand(w_VD, split=split), self._chunk(x_ND, w_VD)
            for rows in _chunks(x_ND, logits_NV):
                with self.scope():
                    part_NV = logits_NV[: len(x_ND[rows])]
                    x = self._operand(x_ND[rows], split=split)
                    self._multiply(x, w, part_NV, transpose_b=True)
                    _nll(part_NV, target_N[rows], nll_N[rows], dnll=dnll)
                    dl = self._operand(part_NV, split=split)  # now their gradient
                    self._multiply(dl, w, dx_ND[rows])
                    self._multiply(dl, x, dw_VD, transpose_a=True, add=True)
        return nll_N, dx_ND

    def _chunk(self, x_ND: FloatArray, w_VD: FloatArray) -> FloatArray:
        """Room for the logits of as many rows as are computed at a time, by the sizes alone."""
        V = len(w_VD)
        rows = CHUNK_BYTES // (V * x_ND.dtype.itemsize) // CHUNK_ROWS * CHUNK_ROWS
        return self.empty((min(len(x_ND), max(CHUNK_ROWS, rows)), V), x_ND.dtype)


def _chunks(x_ND: FloatArray, logits_NV: FloatArray) -> Iterator[slice]:
    for first in range(0, len(x_ND), max(1, len(logits_NV))):
        yield slice(first, first + len(logits_NV))


def _nll(logits_NV: FloatArray, target_N: IntArray, nll_N: FloatArray, *, dnll: float | None) -> None:
    """The NLL of each row; with a `dnll`, logits become their own gradient."""
    N, V = logits_NV.shape
    gradient, dnll = dnll is not None, dnll or 0.0
    block = (threads_of_row(V),)
    KERNELS.launch("nll", logits_NV.dtype, (N,), block, logits_NV, target_N, V, dnll, gradient, nll_N)
