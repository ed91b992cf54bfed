"""Writing integers into their packed form (`pack.cu`): the layout is that of files."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.packing import FORMATS, PANEL, PackedMatrices
from mhmoe_np.types import FloatArray

GROUPS_OF_BLOCK = 32
KERNELS = Kernels("pack")


class Pack(Memory):
    """See `Operations`: packing."""

    def pack_in_place(self, q_EOI: FloatArray, packed: PackedMatrices) -> None:
        """See `Operations.pack_in_place`."""
        experts, panels, groups, _ = packed.code.shape
        grid = (experts * panels * blocks(groups, GROUPS_OF_BLOCK),)
        sizes = panels, packed.outputs, packed.inputs, groups, FORMATS[packed.format].depth
        KERNELS.launch("pack", q_EOI.dtype, grid, (GROUPS_OF_BLOCK, PANEL), q_EOI, *sizes, packed.code)

    def scale_of_rows(self, q_EOI: FloatArray, beta_EO: FloatArray) -> FloatArray:
        """Beta, but NaN for a row of integers of which one is not finite: codes cannot say so [D12].

        Shapes   q_EOI, beta_EO -> [E, O]
        """
        rows, I = beta_EO.size, q_EOI.shape[-1]
        scale_EO: FloatArray = self.empty(beta_EO.shape, beta_EO.dtype)
        grid, block = (blocks(rows, PANEL),), (GROUPS_OF_BLOCK, PANEL)
        arguments = q_EOI, beta_EO, np.int64(rows), I, scale_EO
        KERNELS.launch("scale_of_rows", q_EOI.dtype, grid, block, *arguments)
        return scale_EO
