"""Sharing out tasks of unequal length: each worker takes the next one as soon as it is free.

Numba gives every thread an equal number of loop turns beforehand. Where turns differ in length, or a
core is slowed by something else, the others would wait. So such a loop is over workers, and these draw
the numbers of their tasks from a common counter. No two tasks write to one place: who runs which does
not matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types

from mhmoe_np.operations.numba_cpu.compiling import typed_intrinsic
from mhmoe_np.types import IntArray


def workers() -> tuple[int, IntArray]:
    """How many there are, and their counter."""
    return get_num_threads(), np.zeros(1, np.int64)


@typed_intrinsic
def take_number(typing_context: Any, counter: Any) -> Any:
    """The counter's value; it is one more for whoever asks next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code
