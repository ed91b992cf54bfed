"""How each instruction set cuts a packed product: the sizes of its tiles.

A tile is some rows of activations against some vectors of outputs, whose int32 sums stay in registers
over all inputs. More rows share the unpacking of a vector's codes; more vectors share the loading of a
row's activations; too many of both no longer fit the registers.
"""

from __future__ import annotations

from typing import NamedTuple

from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.packing import FormatName

ALONE, MANY, FOUR, TWO, ONE, FOUR_BY_ONE, ONE_BY_ONE = range(7)
"""The tiles of one instruction set: for a single row, and for more rows in falling number; the last
two are for vectors left over."""


class Tiles(NamedTuple):
    """How an instruction set cuts a product."""

    lanes: int  # int32 sums of a vector
    many: int  # rows of the largest tile
    across: int  # vectors of a tile
    alone: dict[FormatName, int]  # vectors of a tile of a single row; whole panels

    def rows_and_vectors(self, kind: int, format: FormatName) -> tuple[int, int]:
        """The size of a tile."""
        return {
            ALONE: (1, self.alone[format]),
            MANY: (self.many, self.across),
            FOUR: (4, self.across),
            TWO: (2, self.across),
            ONE: (1, self.across),
            FOUR_BY_ONE: (4, 1),
            ONE_BY_ONE: (1, 1),
        }[kind]


# Measured (benchmarks.packed): larger tiles spill registers, smaller ones unpack too often.
TILES: dict[InstructionSet, Tiles] = {
    "avx512vnni": Tiles(16, 6, 4, {"ternary-2bit": 4, "ternary-base3": 8, "sign-1bit": 2}),
    "avxvnni": Tiles(8, 6, 2, {"ternary-2bit": 2, "ternary-base3": 4, "sign-1bit": 2}),
    "avx2": Tiles(8, 8, 1, {"ternary-2bit": 2, "ternary-base3": 4, "sign-1bit": 2}),
    "portable": Tiles(8, 4, 1, {"ternary-2bit": 2, "ternary-base3": 2, "sign-1bit": 2}),
}
MOST_SUMS = max(tiles.lanes * tiles.many * tiles.across for tiles in TILES.values())
