"""Small integers in few bits: the layouts of packed weights, there and back.

A matrix [O, I] is cut into panels of 16 rows (outputs) and groups of inputs. One group of one panel is
64 bytes, [16 outputs][4 inputs]; a byte holds the codes of `depth` such quads of inputs that follow
each other, so an input index is i = (group * depth + quad) * 4 + place. A register loaded from there
holds, after unpacking one quad in place, four inputs of each of its outputs: what the byte dot product
of every processor wants. Codes are unsigned, value minus `lowest` divided by `step`; padding
has code 0 and meets activations that are 0.

    ternary-2bit    -1, 0, 1 as 0, 1, 2; quad b in bits 2b and 2b+1
    ternary-base3   the same, five to a byte: ceil(256/243 * sum_b code_b 3^(4-b)). Tripling the byte
                    pushes the first code out at the top, and the next, and so on
    sign-1bit       -1, 1 as 0, 1; quad b in bit b

Departs from HF's layout, which is made for unpacking whole matrices.

Source   [spec 5 packed weights]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.types import IntArray

PANEL = 16  # outputs of one panel
PLACES = 4  # inputs that one lane of the byte dot product sums
LAYOUT = "panel16x4"  # the name of the arrangement above, written into files
FormatName = Literal["ternary-2bit", "ternary-base3", "sign-1bit"]


class PackingFormat(NamedTuple):
    """How integers become codes, and codes bytes."""

    name: FormatName
    depth: int  # codes in a byte
    base: int  # codes are 0 .. base-1
    lowest: int  # the value of code 0
    step: int  # between the values of neighbouring codes

    @property
    def group(self) -> int:
        """Inputs of one group."""
        return PLACES * self.depth


FORMATS: Mapping[FormatName, PackingFormat] = MappingProxyType(
    {
        "ternary-2bit": PackingFormat("ternary-2bit", depth=4, base=3, lowest=-1, step=1),
        "ternary-base3": PackingFormat("ternary-base3", depth=5, base=3, lowest=-1, step=1),
        "sign-1bit": PackingFormat("sign-1bit", depth=8, base=2, lowest=-1, step=2),
    }
)


class PackedMatrices(NamedTuple):
    """A stack of packed matrices of one size: those of all experts, or a single one."""

    code: NDArray[np.uint8]  # [E, panels, groups, 64]
    outputs: int  # O
    inputs: int  # I
    format: FormatName

    def matrix(self, e: int) -> PackedMatrices:
        """The matrix e alone."""
        return self._replace(code=self.code[e : e + 1])


def code_shape(outputs: int, inputs: int, format: FormatName) -> tuple[int, int, int]:
    """[panels, groups, 64] of one matrix.

    Source   [spec 5 packed weights]
    """
    return -(-outputs // PANEL), -(-inputs // FORMATS[format].group), PANEL * PLACES


def empty_code(experts: int, outputs: int, inputs: int, format: FormatName) -> NDArray[np.uint8]:
    """Room for the codes of a stack, at a multiple of 64 bytes: no group straddles two cache lines.

    Shapes   -> [E, panels, groups, 64]
    Source   [spec 5 packed weights]
    """
    return aligned((experts, *code_shape(outputs, inputs, format)), np.uint8)


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised array that begins at a multiple of 64 bytes.

    Source   [spec 5 packed weights]
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + PANEL * PLACES, np.uint8)
    start = -room.ctypes.data % (PANEL * PLACES)
    return room[start : start + size].view(dtype).reshape(shape)


def pack(q_EOI: NDArray[Any], format: FormatName) -> PackedMatrices:
    """Pack integers, of any dtype.

    Shapes   q_EOI
    Raises   ValueError: a value that the format does not have.
    Source   [spec 5 packed weights]
    """
    experts, outputs, inputs = q_EOI.shape
    _, depth, base, lowest, step = FORMATS[format]
    panels, groups, width = code_shape(outputs, inputs, format)
    if not np.isin(q_EOI, lowest + step * np.arange(base)).all():
        raise ValueError(f"{format} holds {[lowest + step * code for code in range(base)]} alone")
    code = np.zeros((experts, panels * PANEL, groups * depth * PLACES), np.uint8)
    code[:, :outputs, :inputs] = (q_EOI - lowest) // step
    quads = code.reshape(experts, panels, PANEL, groups, depth, PLACES)
    by_quad = [
        quads[..., quad, :].swapaxes(2, 3).reshape(experts, panels, groups, width)
        for quad in range(depth)
    ]
    packed = empty_code(experts, outputs, inputs, format)
    if format == "ternary-base3":
        value = np.zeros(packed.shape, np.uint16)
        for codes in by_quad:
            value = 3 * value + codes
        packed[...] = (256 * value.astype(np.uint32) + 242) // 243
    else:
        packed[...] = 0
        for quad, codes in enumerate(by_quad):
            packed |= codes << np.uint8(8 // depth * quad)
    return PackedMatrices(packed, outputs, inputs, format)


def unpack(packed: PackedMatrices) -> IntArray:
    """The integers again, int8.

    Shapes   -> q_EOI
    Source   [spec 5 packed weights]
    """
    code, outputs, inputs, name = packed
    depth, lowest, step = FORMATS[name].depth, FORMATS[name].lowest, FORMATS[name].step
    experts, panels, groups, _ = code.shape
    quads = np.empty((experts, panels, PANEL, groups, depth, PLACES), np.int8)
    fraction: NDArray[Any] = code.astype(np.uint16)
    for quad in range(depth):
        if name == "ternary-base3":
            fraction = 3 * (fraction & 0xFF)
            codes = (fraction >> 8).astype(np.int8)
        else:
            codes = (code >> 8 // depth * quad & 2 ** (8 // depth) - 1).astype(np.int8)
        by_group = codes.reshape(experts, panels, groups, PANEL, PLACES)
        quads[..., quad, :] = by_group.swapaxes(2, 3)
    values = quads.reshape(experts, panels * PANEL, groups * depth * PLACES)
    return values[:, :outputs, :inputs] * np.int8(step) + np.int8(lowest)
