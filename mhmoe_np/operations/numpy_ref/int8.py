"""Products with weights in 8-bit integers, whose activations are quantised by the same blocks."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.int8 import BLOCK, Int8Weight, blocks_of, parts_of, quantise_blocks
from mhmoe_np.types import FloatArray


def int8_linear(x_NI: FloatArray, w_OI: Int8Weight) -> FloatArray:
    """y = sum over blocks b, the first one first: (q_w q_x summed over b) * (scale_w * scale_x).

    A block's sum of integers is at most 32 * 127^2 < 2^24: a float holds it exactly, in any order. Then
    come two multiplications and one addition, each rounded: whoever keeps the blocks' order has these
    bits.
    """
    q_EOI, scale_w = parts_of(w_OI)
    outputs, inputs = w_OI.shape[1:]
    q_w = np.zeros((outputs, blocks_of(inputs) * BLOCK), x_NI.dtype)
    q_w[:, :inputs] = q_EOI[0]
    in_blocks = q_w.reshape(outputs, -1, BLOCK)
    scale_w = scale_w[0].astype(x_NI.dtype)
    q_x, scale_x = quantise_blocks(x_NI)
    y_NO: FloatArray = np.zeros((len(x_NI), outputs), x_NI.dtype)
    for b in range(blocks_of(inputs)):
        y_NO += (q_x[:, b] @ in_blocks[:, b].T) * (scale_w[:, b] * scale_x[:, b, None])
    return y_NO
