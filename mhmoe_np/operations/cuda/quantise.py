"""BitNet's activations: rows in 8 bits, and what a BitLinear's inputs act as (`quantise.cu`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray

WARP = 32
THREADS = 256
LONG_ROW = 1024  # numbers; a row of more has a block to itself
KERNELS = Kernels("quantise")


class ByteRows(NamedTuple):
    """Rows quantised to int8, as products with packed weights read them."""

    q_NI: IntArray  # int8, each row padded with zeros
    scale_N: FloatArray  # gamma/127
    sum_N: IntArray  # int32, of each row of q

    @property
    def width(self) -> int:
        """Bytes of a row."""
        width: int = self.q_NI.shape[1]
        return width


class Quantise(Memory):
    """See `Operations`: quantisation of activations."""

    def quantise_rows(self, x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Operations.quantise_rows`."""
        N, I = x_NI.shape
        q_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype)
        scale_N: FloatArray = self.empty((N,), x_NI.dtype)
        KERNELS.launch("quantise_rows", x_NI.dtype, *_grid(N, I), x_NI, N, I, q_NI, scale_N)
        return q_NI, scale_N

    def quantise_to_bytes(self, x_NI: FloatArray, width: int) -> ByteRows:
        """The same as int8; width: of a row in bytes, a multiple of 16 that is at least I."""
        N, I = x_NI.shape
        q_NI: IntArray = self.empty((N, width), np.int8)
        scale_N: FloatArray = self.empty((N,), x_NI.dtype)
        sum_N: IntArray = self.empty((N,), np.int32)
        sizes = N, I, width
        KERNELS.launch(
            "quantise_to_bytes", x_NI.dtype, *_grid(N, I), x_NI, *sizes, q_NI, scale_N, sum_N
        )
        return ByteRows(q_NI, scale_N, sum_N)

    def straight_through(self, x_NI: FloatArray, w: Weight) -> tuple[FloatArray, FloatArray]:
        """The two factors of a linear map as its backward sees them, see `numpy_ref.quantise`.

        w may be a stack too: [E, O, I] with a beta of [E, O].

        Raises TypeError: the weight is packed.
        """
        if isinstance(w, PackedWeight | Int8Weight | BFloat16Weight):
            raise TypeError("packed weights have no gradient")
        if not isinstance(w, BitWeight):
            return x_NI, w
        return self.rows_as_quantised(x_NI), self.weight_as_quantised(w)

    def rows_as_quantised(self, x_NI: FloatArray) -> FloatArray:
        """x_hat = q gamma/127: what a BitLinear's input acts as."""
        N, I = x_NI.shape
        x_hat_NI: FloatArray = self.empty(x_NI.shape, x_NI.dtype)
        KERNELS.launch("act_as_quantised", x_NI.dtype, *_grid(N, I), x_NI, N, I, x_hat_NI)
        return x_hat_NI

    def weight_as_quantised(self, w: BitWeight) -> FloatArray:
        """w_hat = beta w: what a BitLinear's weight acts as; a stack's too."""
        w_hat: FloatArray = self.empty(w.shape, w.w.dtype)
        O, I = w.beta.size, w.shape[-1]
        KERNELS.launch("scale_rows", w.w.dtype, *_grid(O, I), w.w, w.beta, O, I, w_hat)
        return w_hat


def _grid(rows: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block for rows of this length."""
    if length > LONG_ROW:
        return (rows,), (THREADS, 1)
    return (blocks(rows, THREADS // WARP),), (WARP, THREADS // WARP)
