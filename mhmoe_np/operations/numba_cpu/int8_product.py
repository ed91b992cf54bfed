"""Products with 8-bit weights: rows quantised by blocks of 32, multiplied panel by panel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from mhmoe_np.operations.int8 import BLOCK, LARGEST, SMALLEST_ACTIVATION, Int8Weight
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.int8_dot import MANY, MOST_ROWS, ONE, TWO, int8_tile
from mhmoe_np.operations.numba_cpu.quantise import largest_magnitude
from mhmoe_np.operations.packing import PANEL

OFFSET = 128  # that makes weights unsigned (see `int8_dot`)
MOST_SUMS = max(MOST_ROWS.values()) * PANEL


class Int8Stack(NamedTuple):
    """A stack of matrices; a subclass says for which instruction set."""

    q: Any  # int8 [E, panels, groups, 64]
    scale: Any  # float16, taken for uint16, which Numba has: [E, panels, blocks, 16]


# As in `packed`: a type of its own for each instruction set, found by name in this module.
CLASSES: dict[InstructionSet, type[Int8Stack]] = {}
for _set in MOST_ROWS:
    _name = f"Int8Stack_{_set}"
    CLASSES[_set] = globals()[_name] = type(
        _name,
        (Int8Stack,),
        {"__module__": __name__, "__slots__": (), "instruction_set": _set},
    )


def as_int8_stack(weight: Int8Weight, instruction_set: InstructionSet) -> Int8Stack:
    """The same arrays, in the class of this instruction set."""
    return CLASSES[instruction_set](weight.q, weight.scale.view(np.uint16))


def _most_rows(weight: Any) -> int:
    """Rows of the largest tile of a weight's class."""
    raise NotImplementedError("compiled code only")


@overload(_most_rows)
def _compiled_most_rows(weight: Any) -> Any:
    most = MOST_ROWS[weight.instance_class.instruction_set]

    def of_its_class(weight: Any) -> Any:
        return most

    return of_its_class


@exact
def quantise_to_int8(x_NI: Any, q: Any, scale: Any, correction: Any) -> None:
    """Quantise rows by blocks (`numpy_ref.int8.quantise_blocks`).

    Written are q, int8 [rows, inputs in whole blocks], with zeros behind the inputs; scale [rows,
    blocks]; and correction, int32 [rows, blocks]: -128 times the sum of each block.
    """
    real = x_NI.dtype.type
    for n in range(x_NI.shape[0]):
        x_I, q_row = x_NI[n], q[n]
        q_row[len(x_I) :] = 0
        for b in range(scale.shape[1]):
            x, to = x_I[b * BLOCK : (b + 1) * BLOCK], q_row[b * BLOCK : (b + 1) * BLOCK]
            gamma = largest_magnitude(x)
            if gamma < real(SMALLEST_ACTIVATION):  # NaN stays
                gamma = real(SMALLEST_ACTIVATION)
            inverse = real(LARGEST) / gamma
            for i in range(len(x)):
                to[i] = np.int8(np.rint(x[i] * inverse))
            total = np.int32(0)
            for i in range(len(to)):
                total += np.int32(to[i])
            scale[n, b] = gamma / real(LARGEST)
            correction[n, b] = np.int32(-OFFSET) * total


class Int8Product(NamedTuple):
    """y = the product with w[e] on some rows, which are quantised already."""

    weight: Any
    e: Any
    q: Any  # int8 [rows, inputs in whole blocks]
    scale: Any  # [rows, blocks]
    correction: Any  # int32 [rows, blocks]
    y_NO: Any  # written


@exact
def int8_product(a: Any, first_panel: Any, last_panel: Any) -> None:
    """The product's outputs of panels first .. last-1.

    Panels outside, rows inside: a panel's weights stay in the nearest cache while all rows pass them.
    """
    rows, outputs = a.y_NO.shape
    most = _most_rows(a.weight)
    tile = np.empty(MOST_SUMS, a.y_NO.dtype)
    for panel in range(first_panel, last_panel):
        place = a.e * a.weight.q.shape[1] + panel
        n = np.intp(0)  # a literal 0 would be a type of its own and compile what follows once more
        while n < rows:
            if rows - n >= most:
                int8_tile(a.weight, MANY, place, a.q, a.scale, a.correction, n, tile)
                end = n + most
            elif rows - n >= 2:
                int8_tile(a.weight, TWO, place, a.q, a.scale, a.correction, n, tile)
                end = n + 2
            else:
                int8_tile(a.weight, ONE, place, a.q, a.scale, a.correction, n, tile)
                end = n + 1
            column = panel * PANEL
            present = min(PANEL, outputs - column)  # what reaches beyond the outputs is padding
            for row in range(n, end):
                y_O = a.y_NO[row, column : column + present]
                first = (row - n) * PANEL
                for o in range(present):
                    y_O[o] = tile[first + o]
            n = end


@exact
def project_int8(x_NI: Any, weight: Any, e: Any, y_NO: Any) -> None:
    """A whole linear map on some rows: quantise, multiply."""
    rows, blocks = len(x_NI), weight.scale.shape[2]
    q = np.empty((rows, blocks * BLOCK), np.int8)
    scale, correction = np.empty((rows, blocks), x_NI.dtype), np.empty((rows, blocks), np.int32)
    quantise_to_int8(x_NI, q, scale, correction)
    first = np.intp(0)  # not a literal, as above
    int8_product(Int8Product(weight, e, q, scale, correction, y_NO), first, weight.q.shape[1])
