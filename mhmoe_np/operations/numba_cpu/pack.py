"""Writing integers into their packed form (see `packing`), a panel a task."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.regions import ELEMENT_MACS, run, tasks_of
from mhmoe_np.operations.packing import FORMATS, PANEL, PLACES, PackedMatrices
from mhmoe_np.types import FloatArray


class Coding(NamedTuple):
    """A format as compiled code takes it."""

    lowest: int  # the value of code 0
    step: int  # between the values of neighbouring codes
    depth: int  # quads in a byte
    bits: int  # of a code; 0: codes are the digits of a number in base 3


@exact
def _codes_of_group(q_I: Any, coding: Any, lane: Any) -> None:
    """The four bytes of one output: the codes of a group's inputs, which the last group may lack."""
    bits = coding.bits
    for place in range(PLACES):
        value = np.int32(0)
        for quad in range(coding.depth):
            i = quad * PLACES + place
            code = np.int32(0)
            if i < len(q_I):
                code = np.int32(q_I[i] - coding.lowest) >> (coding.step - 1)
            value = value | code << (bits * quad) if bits > 0 else 3 * value + code
        lane[place] = value if bits > 0 else (256 * value + 242) // 243


@exact
def _codes_of_ternary_group(q_I: Any, lane: Any) -> None:
    """The same for a whole group of ternary-2bit, the format that training uses most."""
    for place in range(PLACES):
        value = np.int32(q_I[place]) + 1
        value |= (np.int32(q_I[place + 4]) + 1) << 2
        value |= (np.int32(q_I[place + 8]) + 1) << 4
        value |= (np.int32(q_I[place + 12]) + 1) << 6
        lane[place] = value


class PackedPanels(NamedTuple):
    """A stack to pack."""

    q_EOI: Any
    coding: Coding
    code: Any  # written: uint8 [E, panels, groups, 64]


@tasks_of(PackedPanels, exact)
def _pack_panel(i: int, a: Any) -> None:
    """Codes of up to 16 outputs; outputs beyond the matrix have code 0."""
    panels = a.code.shape[1]
    e, panel = i // panels, i % panels
    q_OI, code = a.q_EOI[e, panel * PANEL : (panel + 1) * PANEL], a.code[e, panel]
    group = a.coding.depth * PLACES
    whole = q_OI.shape[1] // group if a.coding.bits == 2 else 0
    for output in range(PANEL):
        first, end = output * PLACES, (output + 1) * PLACES
        if output >= len(q_OI):
            code[:, first:end] = 0
            continue
        q_I = q_OI[output]
        for g in range(whole):
            _codes_of_ternary_group(q_I[g * group :], code[g, first:end])
        for g in range(whole, len(code)):
            _codes_of_group(q_I[g * group : (g + 1) * group], a.coding, code[g, first:end])


class Pack(Buffers):
    """See `Operations`: packing."""

    def pack_in_place(self, q_EOI: FloatArray, packed: PackedMatrices) -> None:
        """See `Operations.pack_in_place`."""
        _, depth, base, lowest, step = FORMATS[packed.format]
        bits = 8 // depth if 2 ** (8 // depth) >= base else 0
        matrices, panels = packed.code.shape[:2]
        region = PackedPanels(q_EOI, Coding(lowest, step, depth, bits), packed.code)
        run(region, matrices * panels, macs=q_EOI.size * ELEMENT_MACS)
