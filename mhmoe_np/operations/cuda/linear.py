"""Products of matrices, by cuBLAS, and linear maps; `linear.cu` has the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.cuda.cublas import WORKSPACE_BYTES, Cublas
from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.cuda.packed import PackedProducts, on_device
from mhmoe_np.operations.cuda.sums import Sums
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.settings.run import Matmul
from mhmoe_np.types import FloatArray

THREADS = 256
BLOCK = 32, 8  # columns and rows
# Up to so many rows a product is bound by reading the weights. Splitting them costs more than it saves:
# three numbers moved for each, and three products that read one.
FEW_ROWS = 32
KERNELS = Kernels("linear")


class Operand(NamedTuple):
    """A matrix as products take it: itself, or split into the numbers of tf32 that sum up to it."""

    high: Any
    low: Any = None


class Products(Memory):
    """Products of matrices, in the way that `matmul` says: float32's; float64 is itself always."""

    def __init__(self, *, keep_buffers: bool, matmul: Matmul) -> None:
        super().__init__(keep_buffers=keep_buffers, matmul=matmul)
        self._cublas = Cublas(self._stream, self.zeros((WORKSPACE_BYTES,), np.uint8), matmul=matmul)

    def _splits(self, x_NI: FloatArray) -> bool:
        """Whether products of this matrix are to be three of tf32."""
        return self.matmul == "tf32x3" and x_NI.dtype == np.float32 and len(x_NI) > FEW_ROWS

    def _operand(self, x_NI: FloatArray, *, split: bool) -> Operand:
        """The matrix for `_multiply`; what it is split into lasts as long as the scope."""
        if not split:
            return Operand(x_NI)
        high, low = self.empty(x_NI.shape, x_NI.dtype), self.empty(x_NI.shape, x_NI.dtype)
        grid, size = (blocks(x_NI.size, THREADS),), np.int64(x_NI.size)
        KERNELS.launch("split", x_NI.dtype, grid, (THREADS,), x_NI, size, high, low)
        return Operand(high, low)

    def _multiply(
        self,
        a: Operand,
        b: Operand,
        out: FloatArray,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        add: bool = False,
    ) -> None:
        """out = a @ b, or out += a @ b, either transposed where so said; both are split or neither."""
        pairs = [(a.high, b.high)]
        if a.low is not None:
            pairs = [(a.low, b.high), (a.high, b.low), *pairs]  # the small ones first
        for i, (left, right) in enumerate(pairs):
            self._cublas.gemm(
                left,
                right,
                out,
                transpose_a=transpose_a,
                transpose_b=transpose_b,
                beta=float(add or i > 0),
                tf32=self.matmul == "tf32" or a.low is not None,
            )


class Linear(Products, PackedProducts, Sums):
    """See `Operations`: linear maps."""

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """See `Operations.linear`.

        Work 2 N I O FLOP; moves 4 (N I + O I + N O) bytes: on an H100 bound by reading the weights with
        fewer than some 40 rows, by arithmetic with more.
        """
        w_OI = on_device(w_OI)
        if isinstance(w_OI, BitWeight | PackedWeight):
            y_NO = self.bit_linear(x_NI, w_OI)
        else:
            y_NO = self.empty((len(x_NI), len(w_OI)), x_NI.dtype)
            with self.scope():
                split = self._splits(x_NI)
                x, w = self._operand(x_NI, split=split), self._operand(w_OI, split=split)
                self._multiply(x, w, y_NO, transpose_b=True)
        if b_O is not None:
            N, O = y_NO.shape
            grid = blocks(N, BLOCK[1]), blocks(O, BLOCK[0])
            KERNELS.launch("add_to_rows", y_NO.dtype, grid, BLOCK, b_O, N, O, y_NO)
        return y_NO

    def linear_backward(
        self,
        dy_NO: FloatArray,
        x_NI: FloatArray,
        w_OI: Weight,
        dw_OI: FloatArray,
        db_O: FloatArray | None,
        *,
        onto_NI: FloatArray | None = None,
    ) -> FloatArray:
        """See `Operations.linear_backward`.

        y[n,o] = sum_i x[n,i] w[o,i] + b[o], hence
        dx[n,i] = sum_o dy[n,o] w[o,i];  dw[o,i] = sum_n dy[n,o] x[n,i];  db[o] = sum_n dy[n,o].
        Work 4 N I O FLOP: bound by arithmetic.
        """
        dx_NI = self.empty(x_NI.shape, x_NI.dtype) if onto_NI is None else onto_NI
        with self.scope():
            acting = self.straight_through(x_NI, w_OI)
            split = self._splits(x_NI)
            dy, x, w = (self._operand(array, split=split) for array in (dy_NO, *acting))
            self._multiply(dy, x, dw_OI, transpose_a=True, add=True)
            self._multiply(dy, w, dx_NI, add=onto_NI is not None)
            if db_O is not None:
                self._add_column_sums(dy_NO, db_O)
        return dx_NI
