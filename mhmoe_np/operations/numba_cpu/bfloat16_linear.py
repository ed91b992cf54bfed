"""Linear maps with bfloat16 weights, each read once for all rows: for the few rows of decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.numba_cpu.arithmetic import float_of
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import reduction, task
from mhmoe_np.operations.numba_cpu.regions import block, blocks, run, tasks_of
from mhmoe_np.types import FloatArray

OUTPUTS = 256  # of one task


@reduction
def _bfloat16_dot(x_I: Any, bits_I: Any) -> Any:
    """x . w; a bfloat16 becomes a float32 by 16 zero bits."""
    total = x_I.dtype.type(0)
    for i in range(len(x_I)):
        total += x_I[i] * x_I.dtype.type(float_of(np.int32(np.int32(bits_I[i]) << np.int32(16))))
    return total


class BFloat16Outputs(NamedTuple):
    """y = x @ w^T, some outputs of all rows a task."""

    x_NI: Any
    bits_OI: Any  # uint16
    y_NO: Any  # written


@tasks_of(BFloat16Outputs, task)
def _bfloat16_outputs(i: int, a: Any) -> None:
    outputs = block(i, OUTPUTS)
    for o in range(outputs.start, min(outputs.stop, len(a.bits_OI))):
        for n in range(len(a.x_NI)):
            a.y_NO[n, o] = _bfloat16_dot(a.x_NI[n], a.bits_OI[o])


class BFloat16Linear(Buffers):
    """Linear maps with a `BFloat16Weight`."""

    def bfloat16_linear(self, x_NI: FloatArray, w_OI: BFloat16Weight, y_NO: FloatArray) -> None:
        """Overwrite y_NO by the product."""
        region = BFloat16Outputs(x_NI, w_OI.bits, y_NO)
        run(region, blocks(y_NO.shape[1], OUTPUTS), macs=y_NO.size * x_NI.shape[1])
