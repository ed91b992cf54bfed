"""Linear maps and the embedding."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.bfloat16 import BFloat16Weight, from_bfloat16
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.numpy_ref.int8 import int8_linear
from mhmoe_np.operations.numpy_ref.quantise import integers, quantise_rows, straight_through
from mhmoe_np.operations.numpy_ref.sums import added
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.types import FloatArray, IntArray


def linear(x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
    """See `Operations.linear`."""
    if isinstance(w_OI, BitWeight | PackedWeight):
        y_NO = bit_linear(x_NI, w_OI)
    elif isinstance(w_OI, Int8Weight):
        y_NO = int8_linear(x_NI, w_OI)
    elif isinstance(w_OI, BFloat16Weight):
        y_NO = x_NI @ from_bfloat16(w_OI).astype(x_NI.dtype, copy=False).T
    else:
        y_NO = x_NI @ w_OI.T
    return y_NO if b_O is None else y_NO + b_O


def bit_linear(x_NI: FloatArray, w_OI: BitWeight | PackedWeight) -> FloatArray:
    """y = (q @ w^T) * (beta * gamma/127).

    A float32 holds every integer up to 2^24, and |q @ w^T| <= 128 I: exact in any order for
    I <= 131,072, whether the integers came packed or not. Integers have one zero: adding 0 turns the
    -0 of a float product into it.
    """
    q_OI, beta_O, _ = integers(w_OI, x_NI.dtype)
    q_NI, scale_N = quantise_rows(x_NI)
    # B1 eq. 11: W~ Quant(x) * (beta gamma / 127); the norm before it is the layers'
    return (q_NI @ q_OI.T + 0) * (beta_O * scale_N[:, None])


def linear_backward(
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
    Quantised, x and w are what they act as (`straight_through`).
    """
    x_NI, w_hat_OI = straight_through(x_NI, w_OI)
    dw_OI += dy_NO.T @ x_NI
    if db_O is not None:
        db_O += dy_NO.sum(axis=0)
    return added(dy_NO @ w_hat_OI, onto_NI)


def embedding(id_N: IntArray, w_VD: FloatArray) -> FloatArray:
    """See `Operations.embedding`."""
    return w_VD[id_N]


def embedding_backward(dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
    """See `Operations.embedding_backward`. An id that occurs twice receives both rows."""
    np.add.at(dw_VD, id_N, dx_ND)
