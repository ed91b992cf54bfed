"""Rotary positions; `rotary.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, steps_of, strided
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.types import FloatArray, IntArray

THREADS = 128
KERNELS = Kernels("rotary")


class Rotary(Memory):
    """See `Operations`: rotary positions."""

    def rotate_in_place(
        self,
        x_BTAC: FloatArray,
        cos_YJ: FloatArray,
        sin_YJ: FloatArray,
        first_1: IntArray | None,
    ) -> None:
        """See `Operations.rotate_in_place`."""
        B, T, A, _ = x_BTAC.shape
        name = "rotate_in_place" if first_1 is None else "rotate_in_place_from"
        first = () if first_1 is None else (first_1,)
        steps = map(np.int64, steps_of(x_BTAC))
        arguments = strided(x_BTAC), *steps, cos_YJ, sin_YJ, *first, T, A, cos_YJ.shape[1]
        KERNELS.launch(name, x_BTAC.dtype, (B * T,), (THREADS,), *arguments)
