"""Weights as 8-bit integers with a scale for each block of 32 inputs: llama.cpp's Q8_0.

A block is 32 neighbouring inputs of one output; the last one of an output may have fewer.

    scale = max|w| / 127, rounded to float16
    q = clip(round(w / scale), -127, 127), halves to even; 0 where the scale is 0

q is of the scale that is kept; llama.cpp's is of the scale before it is rounded. So no weight is
further than half a scale from q * scale, and integers and scales that were unpacked are found again.
(Scales below 2^-14, where float16 has fewer digits, may be up to 2^-25 too small, and the largest
weights are cut by 127 times as much.)

The integers lie as packed codes do (see `packing`), with one quad to a byte: panels of 16 outputs,
[16 outputs][4 inputs] side by side, eight such of a block. The 16 scales of a panel and a block stand
together. Padding is 0.

Source   [spec 5 8-bit weights]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.operations.packing import PANEL, PLACES, aligned
from mhmoe_np.types import FloatArray, IntArray

INT8: Literal["int8"] = "int8"  # the name of the format
BLOCK = 32  # inputs with one scale
QUADS = BLOCK // PLACES  # groups of 64 bytes that a block of a panel has
LARGEST = 127  # integer
LARGEST_WEIGHT = LARGEST * float(np.finfo(np.float16).max)  # whose scale float16 has
SMALLEST_ACTIVATION = 1e-30  # of which 127 / |x| is still finite in float32


class Int8Weight(NamedTuple):
    """A stack of matrices of one size in 8-bit integers: those of all experts, or a single one."""

    q: NDArray[np.int8]  # [E, panels, groups, 64]
    scale: NDArray[np.float16]  # [E, panels, blocks, 16]
    outputs: int  # O
    inputs: int  # I

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, O, I], E = 1 for a single matrix."""
        return len(self.q), self.outputs, self.inputs

    @property
    def nbytes(self) -> int:
        """Of integers and scales, padding included."""
        return self.q.nbytes + self.scale.nbytes

    def matrix(self, e: int) -> Int8Weight:
        """The matrix e alone."""
        return self._replace(q=self.q[e : e + 1], scale=self.scale[e : e + 1])

    def panels(self, first: int, last: int) -> Int8Weight:
        """The outputs of panels first .. last-1 alone."""
        outputs = min(last * PANEL, self.outputs) - first * PANEL
        return Int8Weight(self.q[:, first:last], self.scale[:, first:last], outputs, self.inputs)


def blocks_of(inputs: int) -> int:
    """How many blocks an output of so many inputs has."""
    return -(-inputs // BLOCK)


def empty_int8(experts: int, outputs: int, inputs: int) -> Int8Weight:
    """Room for a stack, at multiples of 64 bytes.

    Source   [spec 5 8-bit weights]
    """
    panels, blocks = -(-outputs // PANEL), blocks_of(inputs)
    q = aligned((experts, panels, blocks * QUADS, PANEL * PLACES), np.int8)
    return Int8Weight(q, aligned((experts, panels, blocks, PANEL), np.float16), outputs, inputs)


def to_int8(w_EOI: FloatArray) -> Int8Weight:
    """Quantise float32 weights.

    Shapes   w_EOI
    Raises   ValueError: a weight is not finite, or larger than LARGEST_WEIGHT.
    Source   [spec 5 8-bit weights]
    """
    experts, outputs, inputs = w_EOI.shape
    weight = empty_int8(experts, outputs, inputs)
    _, panels, groups, _ = weight.q.shape
    blocks = weight.scale.shape[2]
    for e in range(experts):
        padded = np.zeros((panels * PANEL, blocks * BLOCK), np.float32)
        padded[:outputs, :inputs] = w_EOI[e]
        in_blocks = padded.reshape(panels * PANEL, blocks, BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):
            scale = (np.abs(in_blocks).max(axis=2) / np.float32(LARGEST)).astype(np.float16)
        if not np.isfinite(scale).all():
            raise ValueError(f"a weight is not finite or beyond {LARGEST_WEIGHT:.3g}")
        divisor = np.where(scale > 0, scale, np.inf).astype(np.float32)
        in_blocks /= divisor[:, :, None]
        np.clip(np.rint(in_blocks, out=in_blocks), -LARGEST, LARGEST, out=in_blocks)
        quads = padded.reshape(panels, PANEL, groups, PLACES)
        weight.q[e] = quads.swapaxes(1, 2).reshape(weight.q.shape[1:])
        weight.scale[e] = scale.reshape(panels, PANEL, blocks).swapaxes(1, 2)
    return weight


def parts_of(weight: Int8Weight) -> tuple[IntArray, NDArray[np.float16]]:
    """The integers, int8 [E, O, I], and the scales, float16 [E, O, blocks], without padding.

    Source   [spec 5 8-bit weights]
    """
    experts, panels, groups, _ = weight.q.shape
    quads = weight.q.reshape(experts, panels, groups, PANEL, PLACES).swapaxes(2, 3)
    q_EOI = quads.reshape(experts, panels * PANEL, groups * PLACES)
    scale = weight.scale.swapaxes(2, 3).reshape(experts, panels * PANEL, -1)
    return q_EOI[:, : weight.outputs, : weight.inputs], scale[:, : weight.outputs]


def from_int8(weight: Int8Weight) -> FloatArray:
    """The weights that these act as, q * scale: a float32 holds each product exactly.

    Shapes   -> w_EOI
    Source   [spec 5 8-bit weights]
    """
    q_EOI, scale = parts_of(weight)
    w_EOI: FloatArray = np.repeat(scale.astype(np.float32), BLOCK, axis=2)[:, :, : weight.inputs]
    w_EOI *= q_EOI
    return w_EOI


def quantise_blocks(x_NI: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Integers of rows in blocks of 32 inputs, kept as floats, and each block's scale.

    gamma = max(max|x|, 1e-30);  q = round(x * (127/gamma)), halves to even;  scale = gamma/127.
    |q| <= 127 whatever the roundings. The last block is filled up with zeros.

    Returns q, [N, blocks, 32], and scale, [N, blocks], of x's type. A block with a number that is not
    finite has such a scale.

    Shapes   x_NI
    Source   [spec 5 8-bit weights]
    """
    N, I = x_NI.shape
    real = x_NI.dtype.type
    padded = np.zeros((N, blocks_of(I) * BLOCK), real)
    padded[:, :I] = x_NI
    in_blocks = padded.reshape(N, blocks_of(I), BLOCK)
    gamma = np.maximum(np.abs(in_blocks).max(axis=2), real(SMALLEST_ACTIVATION))
    return np.rint(in_blocks * (real(LARGEST) / gamma)[:, :, None]), gamma / real(LARGEST)
