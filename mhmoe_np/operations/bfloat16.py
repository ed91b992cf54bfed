"""Weights as bfloat16: the upper half of a float32, which NumPy does not have."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.types import FloatArray


class BFloat16Weight(NamedTuple):
    """One matrix in bfloat16."""

    bits: NDArray[np.uint16]  # [O, I]

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I]."""
        return self.bits.shape


def to_bfloat16(w_OI: FloatArray) -> BFloat16Weight:
    """Round finite float32 weights to the nearest bfloat16, halves to even.

    Shapes   w_OI
    Source   [spec 5 output head]
    """
    bits = np.ascontiguousarray(w_OI, np.float32).view(np.uint32)
    # Half a step less one, and one more where the last place that stays is odd.
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return BFloat16Weight((rounded >> np.uint32(16)).astype(np.uint16))


def from_bfloat16(weight: BFloat16Weight) -> FloatArray:
    """The same numbers as float32.

    Shapes   -> w_OI
    Source   [spec 5 output head]
    """
    return (weight.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
