"""Stacks of matrices, one for each expert, of any kind of weight, and their products."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.gemm import product_nt
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.int8_product import Int8Stack, as_int8_stack, project_int8
from mhmoe_np.operations.numba_cpu.packed import Packed, as_stack
from mhmoe_np.operations.numba_cpu.packed_product import project_packed
from mhmoe_np.operations.numba_cpu.quantise import quantise_block, scale_block
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight


class Unpacked(NamedTuple):
    """Matrices with a number an entry: floats, or the integers of a `BitWeight` with their scales."""

    w_EOI: Any
    betas: Any  # [E, O], the scales of the integers; [E, 0] where the entries are floats
    quantised: bool


def stack_of(weight: Weight, instruction_set: InstructionSet) -> Unpacked | Packed | Int8Stack:
    """The weight as compiled code takes it."""
    if isinstance(weight, PackedWeight):
        return as_stack(weight, instruction_set)
    if isinstance(weight, Int8Weight):
        return as_int8_stack(weight, instruction_set)
    if isinstance(weight, BitWeight):
        return Unpacked(weight.w, weight.beta, True)
    assert not isinstance(weight, BFloat16Weight)  # an output head's
    return Unpacked(weight, np.empty((len(weight), 0), weight.dtype), False)


def project(x_NI: Any, stack: Any, e: int, y_NO: Any) -> None:
    """y = x @ w[e]^T for a stack of any kind; a BitLinear may leave x quantised."""
    raise NotImplementedError("compiled code only")


@overload(project)
def _compiled_project(x_NI: Any, stack: Any, e: Any, y_NO: Any) -> Any:
    kind: Any
    if issubclass(stack.instance_class, Int8Stack):
        kind = project_int8
    elif stack.instance_class is Unpacked:
        kind = _project_unpacked
    else:
        kind = project_packed

    def project(x_NI: Any, stack: Any, e: Any, y_NO: Any) -> None:
        kind(x_NI, stack, e, y_NO)

    return project


@task
def _project_unpacked(x_NI: Any, stack: Any, e: int, y_NO: Any) -> None:
    """In floats, which hold every sum of a BitLinear's integers exactly."""
    if not stack.quantised:
        product_nt(x_NI, stack.w_EOI[e], y_NO)
        return
    scale_N = np.empty(len(x_NI), x_NI.dtype)
    quantise_block(x_NI, x_NI, scale_N)
    product_nt(x_NI, stack.w_EOI[e], y_NO)
    scale_block(y_NO, scale_N, stack.betas[e])
