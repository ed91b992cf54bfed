"""Packed weights as compiled code takes them: one class for each instruction set and format."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.tiles import TILES
from mhmoe_np.operations.packing import FORMATS, FormatName
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight


class Packed(NamedTuple):
    """A stack of packed matrices; a subclass says how to read it."""

    code: Any  # uint8 [E, panels, groups, 64]
    beta_EO: Any
    inputs: int


# Compiled code depends on the instruction set and the format: each pair is a type of its own, so that
# one kernel serves them all and none finds another's machine code in the cache. Cached signatures name
# these classes, which must therefore be found by name in this module.
CLASSES: dict[tuple[InstructionSet, FormatName], type[Packed]] = {}
for _set in TILES:
    for _format in FORMATS.values():
        _name = f"Packed_{_set}_{_format.name}".replace("-", "_")
        CLASSES[_set, _format.name] = globals()[_name] = type(
            _name,
            (Packed,),
            {
                "__module__": __name__,
                "__slots__": (),
                "instruction_set": _set,
                "format": _format.name,
            },
        )


def as_packed(weight: Weight) -> Weight:
    """A `BitWeight` in its packed form, if it has one."""
    if isinstance(weight, BitWeight) and weight.packed is not None:
        experts = len(weight.packed.code)
        return PackedWeight(weight.packed, weight.beta.reshape(experts, -1))
    return weight


def as_stack(weight: PackedWeight, instruction_set: InstructionSet) -> Packed:
    """The same arrays, in the class of this instruction set and format."""
    return CLASSES[instruction_set, weight.w.format](weight.w.code, weight.beta, weight.w.inputs)


class PackedProducts(Buffers):
    """What the operations that take packed weights share: the instruction set."""

    def __init__(self, *, keep_buffers: bool, instruction_set: InstructionSet) -> None:
        super().__init__(keep_buffers=keep_buffers)
        self._instruction_set = instruction_set
