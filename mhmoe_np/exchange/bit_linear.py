"""Hugging Face's layout of packed ternary weights, and its two conventions of scales.

Four rows to a byte: row r of the packed [out/4, in] holds rows r, r+R, r+2R, r+3R with R = out/4, the
first in the lowest bits, each as its value plus 1. The class `AutoBitLinear` multiplies by
`weight_scale`, which is beta; `BitLinear` divides by it, which is then 1/beta.

Source   [spec 5 packed weights]; transformers, integrations/bitnet.py
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PER_BYTE = 4
LinearClass = Literal["autobitlinear", "bitlinear"]


def pack_rows(q_OI: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a matrix of -1, 0, 1 whose rows are a multiple of 4.

    Shapes   q_OI -> [O/4, I]
    """
    outputs, inputs = q_OI.shape
    codes = (q_OI + 1).astype(np.uint8).reshape(PER_BYTE, outputs // PER_BYTE, inputs)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def unpack_rows(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The matrix again; a code that `pack_rows` does not write comes out as 2.

    Shapes   packed [O/4, I] -> q_OI
    """
    codes = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
    return np.concatenate(codes).astype(np.int8) - np.int8(1)


def stored_scale(beta: np.float32, linear_class: LinearClass) -> np.float32:
    """`weight_scale` for a scale beta."""
    return beta if linear_class == "autobitlinear" else np.float32(1) / beta


def scale_of(stored: np.float32, linear_class: LinearClass) -> np.float32:
    """The scale beta for a `weight_scale`; if there is one, a beta that gives the same bits again."""
    if linear_class == "autobitlinear":
        return stored
    beta = np.float32(1) / stored
    neighbours = (beta, np.nextafter(beta, np.float32(0)), np.nextafter(beta, np.float32(np.inf)))
    return next((near for near in neighbours if np.float32(1) / near == stored), beta)
