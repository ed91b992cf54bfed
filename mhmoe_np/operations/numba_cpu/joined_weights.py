"""The matrices of joined steps: floats, packed or in 8 bits, each found by its address.

All layers share one compiled step, and their matrices one type and shape, of which one of them is the
example. A part of a matrix, some of its outputs, is a matrix of its own kind at a later address.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numba.np.numpy_support import carray

from mhmoe_np.operations.int8 import BLOCK, Int8Weight, blocks_of
from mhmoe_np.operations.numba_cpu.compiling import task, typed_intrinsic
from mhmoe_np.operations.numba_cpu.few_rows import few_rows_nt
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.int8_product import (
    Int8Product,
    Int8Stack,
    as_int8_stack,
    int8_product,
    quantise_to_int8,
)
from mhmoe_np.operations.numba_cpu.packed import Packed, as_packed, as_stack
from mhmoe_np.operations.numba_cpu.packed_product import (
    PackedProduct,
    packed_product,
    padded_inputs,
    quantise_to_bytes,
)
from mhmoe_np.operations.packing import PANEL
from mhmoe_np.operations.table import PackedWeight, Weight

TASK_NUMBERS = 1 << 14  # floats of one task, about
MOST_OUTPUTS = 64  # of one task; of matrices in panels always so many, as fewer are slower each

Matrix = np.ndarray | Packed | Int8Stack
"""What compiled code multiplies by: a float matrix [O, I], or a stack of one."""


def as_matrix(weight: Weight, instruction_set: InstructionSet) -> Matrix | None:
    """The weight as a joined step takes it; None: it does not."""
    weight = as_packed(weight)
    if isinstance(weight, PackedWeight):
        return as_stack(weight, instruction_set)
    if isinstance(weight, Int8Weight):
        return as_int8_stack(weight, instruction_set)
    return weight if isinstance(weight, np.ndarray) else None


def arrays_of(matrix: Matrix) -> list[np.ndarray]:
    """What a matrix has in memory: the numbers, and scales where there are any."""
    return [matrix] if isinstance(matrix, np.ndarray) else list(matrix[:2])


def granularity(matrix: Matrix) -> int:
    """Outputs come in whole groups of so many, where a part of a matrix begins or ends."""
    return 1 if isinstance(matrix, np.ndarray) else PANEL


class Scratch(NamedTuple):
    """Room for what inputs become, flat, a row for each worker, or one's row; floats need none."""

    q: Any  # int8
    scale: Any
    whole: Any  # int32: sums or corrections


def scratch_of_workers(workers: int, rows: int, inputs: int, dtype: Any) -> Scratch:
    """Room for so many rows of at most so many inputs, for each worker."""
    blocks = blocks_of(inputs)
    return Scratch(
        np.zeros((workers, rows * blocks * BLOCK), np.int8),
        np.zeros((workers, rows * blocks), dtype),
        np.zeros((workers, rows * blocks), np.int32),
    )


@task
def scratch_of(worker: int, all_of_it: Any) -> Any:
    """One worker's."""
    return Scratch(all_of_it.q[worker], all_of_it.scale[worker], all_of_it.whole[worker])


@typed_intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """An address as that of numbers of the dtype of `like`."""
    pointer = types.CPointer(like.dtype)  # type: ignore[no-untyped-call]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(types.int64, like), code


@task
def array_at(address: int, like: Any, shape: Any) -> Any:
    """The array of that shape that lies at an address."""
    return carray(_pointer(address, like), shape)


@task
def outputs_of_task(like: Any, inputs: int) -> int:
    """How many outputs of so many inputs each are a task: a multiple of 4, or of a panel."""
    if _in_panels(like):
        return MOST_OUTPUTS
    return max(4, min(MOST_OUTPUTS, TASK_NUMBERS // inputs // 4 * 4))


# What depends on the kind of matrix. In compiled code alone.


def _in_panels(like: Any) -> bool:
    raise NotImplementedError


@overload(_in_panels)
def _compiled_in_panels(like: Any) -> Any:
    answer = not isinstance(like, types.Array)

    def of_its_kind(like: Any) -> Any:
        return answer

    return of_its_kind


def outputs_at(like: Any, address: int, of_scales: int, first: int, last: int) -> Any:
    """The outputs first .. last-1 of the matrix at an address, whose scales are at another one."""
    raise NotImplementedError


@overload(outputs_at)
def _compiled_outputs_at(like: Any, address: Any, of_scales: Any, first: Any, last: Any) -> Any:
    if isinstance(like, types.Array):

        def floats(like: Any, address: Any, of_scales: Any, first: Any, last: Any) -> Any:
            inputs = like.shape[1]
            return array_at(address + first * inputs * like.itemsize, like, (last - first, inputs))

        return floats
    kind = like.instance_class
    if issubclass(kind, Int8Stack):

        def in_8_bits(like: Any, address: Any, of_scales: Any, first: Any, last: Any) -> Any:
            q, scale, panel = like.q, like.scale, first // PANEL
            panels, groups, width = (last - first + PANEL - 1) // PANEL, q.shape[2], q.shape[3]
            q_at = address + panel * groups * width
            scale_at = of_scales + panel * scale.shape[2] * PANEL * scale.itemsize
            return kind(
                array_at(q_at, q, (1, panels, groups, width)),
                array_at(scale_at, scale, (1, panels, scale.shape[2], PANEL)),
            )

        return in_8_bits

    def packed(like: Any, address: Any, of_scales: Any, first: Any, last: Any) -> Any:
        code, beta, panel = like.code, like.beta_EO, first // PANEL
        panels, groups, width = (last - first + PANEL - 1) // PANEL, code.shape[2], code.shape[3]
        return kind(
            array_at(address + panel * groups * width, code, (1, panels, groups, width)),
            array_at(of_scales + first * beta.itemsize, beta, (1, last - first)),
            like.inputs,
        )

    return packed


def prepare(like: Any, x_BI: Any, scratch: Any) -> None:
    """Make of some rows what matrices of a kind are multiplied by."""
    raise NotImplementedError


@overload(prepare)
def _compiled_prepare(like: Any, x_BI: Any, scratch: Any) -> Any:
    if isinstance(like, types.Array):

        def nothing(like: Any, x_BI: Any, scratch: Any) -> None:
            pass

        return nothing
    if issubclass(like.instance_class, Int8Stack):

        def to_int8(like: Any, x_BI: Any, scratch: Any) -> None:
            rows, blocks = len(x_BI), like.scale.shape[2]
            quantise_to_int8(
                x_BI,
                scratch.q[: rows * blocks * BLOCK].reshape(rows, blocks * BLOCK),
                scratch.scale[: rows * blocks].reshape(rows, blocks),
                scratch.whole[: rows * blocks].reshape(rows, blocks),
            )

        return to_int8

    def to_bytes(like: Any, x_BI: Any, scratch: Any) -> None:
        rows, padded = len(x_BI), padded_inputs(like)
        q_BI = scratch.q[: rows * padded].reshape(rows, padded)
        quantise_to_bytes(x_BI, q_BI, scratch.scale[:rows], scratch.whole[:rows])

    return to_bytes


def multiply(x_BI: Any, matrix: Any, scratch: Any, y_BO: Any) -> None:
    """y = x @ w^T, after `prepare`."""
    raise NotImplementedError


@overload(multiply)
def _compiled_multiply(x_BI: Any, matrix: Any, scratch: Any, y_BO: Any) -> Any:
    if isinstance(matrix, types.Array):

        def floats(x_BI: Any, matrix: Any, scratch: Any, y_BO: Any) -> None:
            few_rows_nt(x_BI, matrix, y_BO)

        return floats
    if issubclass(matrix.instance_class, Int8Stack):

        def in_8_bits(x_BI: Any, matrix: Any, scratch: Any, y_BO: Any) -> None:
            rows, blocks = len(x_BI), matrix.scale.shape[2]
            q = scratch.q[: rows * blocks * BLOCK].reshape(rows, blocks * BLOCK)
            scale = scratch.scale[: rows * blocks].reshape(rows, blocks)
            correction = scratch.whole[: rows * blocks].reshape(rows, blocks)
            product = Int8Product(matrix, np.intp(0), q, scale, correction, y_BO)
            int8_product(product, np.intp(0), matrix.q.shape[1])

        return in_8_bits

    def packed(x_BI: Any, matrix: Any, scratch: Any, y_BO: Any) -> None:
        rows, padded = len(x_BI), padded_inputs(matrix)
        q_BI = scratch.q[: rows * padded].reshape(rows, padded)
        scale_B, sum_B = scratch.scale[:rows], scratch.whole[:rows]
        product = PackedProduct(matrix, np.intp(0), q_BI, scale_B, sum_B, y_BO)
        packed_product(product, np.intp(0), matrix.code.shape[1])

    return packed
