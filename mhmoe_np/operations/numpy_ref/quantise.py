"""BitNet's quantisers: 8 bits for activations, ternary or sign for weights."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.packing import PackedMatrices, pack, unpack
from mhmoe_np.operations.table import BitWeight, PackedWeight, Quantization, Weight
from mhmoe_np.types import FloatArray

SMALLEST_SCALE = 1e-5


def quantise_rows(x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
    """See `Operations.quantise_rows`."""
    real = x_NI.dtype.type
    # B1 eq. 5: gamma = max |x|, here of each row
    gamma_N = np.maximum(np.abs(x_NI).max(axis=1, initial=0), real(SMALLEST_SCALE))
    # B1 eq. 4: Clip(x * Q / gamma), here rounded to 8 bits
    q_NI = np.clip(np.rint(x_NI * (real(127) / gamma_N)[:, None]), -128, 127)
    return q_NI, gamma_N / real(127)


def quantise_weight(
    w_OI: FloatArray,
    starts: tuple[int, ...],
    *,
    quantization: Quantization,
    q_OI: FloatArray,
    beta_O: FloatArray,
    report_X5: FloatArray,
) -> None:
    """See `Operations.quantise_weight`."""
    quantise = _to_trits if quantization == "bitnet_b158" else _to_signs
    for x, (first, last) in enumerate(pairwise(starts)):
        quantised, beta = quantise(w_OI[first:last])
        counts = [np.count_nonzero(quantised == value) for value in (-1, 0, 1)]
        flipped = np.count_nonzero(quantised != q_OI[first:last])
        report_X5[x] = [beta, *counts, flipped]
        q_OI[first:last] = quantised
        beta_O[first:last] = beta


def _to_trits(w_OI: FloatArray) -> tuple[FloatArray, np.floating[Any]]:
    """One matrix as -1, 0 and +1, and its beta."""
    # B2 eq. 3: beta (there gamma) = mean |W|
    beta = np.maximum(_mean(np.abs(w_OI)), w_OI.dtype.type(SMALLEST_SCALE))
    # B2 eq. 1-2: W~ = RoundClip(W / beta, -1, 1)
    q_OI = np.clip(np.rint(w_OI * (1 / beta)), -1, 1)
    return q_OI, beta


def _to_signs(w_OI: FloatArray) -> tuple[FloatArray, np.floating[Any]]:
    """One matrix as -1 and +1, and its beta."""
    # B1 eq. 12: beta = mean |W|
    beta = np.maximum(_mean(np.abs(w_OI)), w_OI.dtype.type(SMALLEST_SCALE))
    alpha = _mean(w_OI)  # B1 eq. 3: alpha = mean W
    # B1 eq. 1-2: W~ = Sign(W - alpha), -1 at 0
    q_OI = np.where(w_OI - alpha > 0, w_OI.dtype.type(1), -1)
    return q_OI, beta


def pack_in_place(q_EOI: FloatArray, packed: PackedMatrices) -> None:
    """See `Operations.pack_in_place`."""
    packed.code[...] = pack(q_EOI, packed.format).code


def _mean(x_OI: FloatArray) -> np.floating[Any]:
    """The exact sum, rounded once, over the number of elements [D8]."""
    if not np.isfinite(x_OI).all():
        return x_OI.dtype.type(np.nan)
    return x_OI.dtype.type(math.fsum(x_OI.ravel().tolist()) / x_OI.size)


def integers(w: BitWeight | PackedWeight, dtype: np.dtype[Any]) -> BitWeight:
    """One matrix with its integers unpacked, where they are packed."""
    if isinstance(w, BitWeight):
        return w
    return BitWeight(unpack(w.w)[0].astype(dtype), w.beta[0].astype(dtype))


def straight_through(x_NI: FloatArray, w: Weight) -> tuple[FloatArray, FloatArray]:
    """The two factors of a linear map as its backward sees them: what x and w act as.

    y = x_hat @ w_hat^T with x_hat = q gamma/127 and w_hat = beta w; the quantisers themselves count
    as the identity and the scales as constants, so dx = dy @ w_hat and dW = dy^T @ x_hat.
    """
    if isinstance(w, PackedWeight | Int8Weight | BFloat16Weight):
        raise TypeError("packed weights have no gradient")
    if isinstance(w, BitWeight):
        q_NI, scale_N = quantise_rows(x_NI)
        return q_NI * scale_N[:, None], w.beta[:, None] * w.w
    return x_NI, w


def expert(w: Weight, e: int) -> Weight:
    """The weight of one expert."""
    if isinstance(w, BitWeight):
        return BitWeight(w.w[e], w.beta[e])
    if isinstance(w, PackedWeight):
        return PackedWeight(w.w.matrix(e), w.beta[e : e + 1])
    if isinstance(w, Int8Weight):
        return w.matrix(e)
    assert not isinstance(w, BFloat16Weight)  # an output head's
    return w[e]
