"""Scalar and row arithmetic that LLVM vectorises: exp, sigmoid, sums, maxima."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import overload

from mhmoe_np.operations.numba_cpu.compiling import FAST, reduction, task, typed_intrinsic

f32 = np.float32


@typed_intrinsic
def bits_of(typing_context: Any, x: Any) -> Any:
    """The bits of a float32 or float64 as an integer of its size."""
    integer, code = (
        (types.int32, ir.IntType(32)) if x == types.float32 else (types.int64, ir.IntType(64))
    )
    return integer(x), lambda c, b, s, a: b.bitcast(a[0], code)


@typed_intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float with these bits."""
    real, code = (
        (types.float32, ir.FloatType()) if bits == types.int32 else (types.float64, ir.DoubleType())
    )
    return real(bits), lambda c, b, s, a: b.bitcast(a[0], code)


@typed_intrinsic
def side_by_side(typing_context: Any, x_S: Any) -> Any:
    """The same row, of whose numbers the compiler now knows that they lie side by side.

    A block sliced in two axes has rows of unknown stride to Numba, whose loops then stay scalar.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        same: Callable[..., Any] = impl_ret_borrowed
        return same(context, builder, signature.return_type, arguments[0])

    return x_S.copy(layout="C")(x_S), code


def exp(x: Any) -> Any:
    """e^x; of a NaN, NaN.

    float64: the library's. float32: branch-free, relative error 2.2e-7 on [-87, 88], 0 below -87.7 and
    infinite above 88.4. 2^k * polynomial(r) with x = k ln 2 + r (Cephes' expf). k + 127, the exponent
    bits of 2^k, stands in the low bits of x * log2(e) + 1.5 * 2^23 + 127: adding that number rounds to
    an integer.
    """
    raise NotImplementedError("compiled code only")


@overload(exp, jit_options={"fastmath": FAST, "error_model": "numpy"})
def _compiled_exp(x: Any) -> Any:
    if x == types.float64:

        def exp_float64(x: Any) -> Any:
            return math.exp(x)

        return exp_float64

    def exp_float32(x: Any) -> Any:
        x = min(max(x, f32(-88.0)), f32(89.0))  # in this order of arguments a NaN passes through
        shifted = x * f32(1.44269504) + f32(12583039.0)
        k = shifted - f32(12583039.0)
        r = x - k * f32(0.693359375) + k * f32(2.12194440e-4)  # ln 2 in two parts
        p = f32(1.9875691500e-4)
        p = p * r + f32(1.3981999507e-3)
        p = p * r + f32(8.3334519073e-3)
        p = p * r + f32(4.1665795894e-2)
        p = p * r + f32(1.6666665459e-1)
        p = p * r + f32(5.0000001201e-1)
        y = p * (r * r) + r + f32(1)
        return y * float_of(types.int32(bits_of(shifted) << types.int32(23)))

    return exp_float32


@task
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x), in the type of x."""
    one = type(x)(1)
    return one / (one + exp(-x))


@typed_intrinsic
def in_order(typing_context: Any, bits: Any) -> Any:
    """Of a float's bits the integer that orders as the float does; of such an integer, the bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        negative = builder.ashr(bits, ir.Constant(bits.type, bits.type.width - 1))
        return builder.xor(bits, builder.lshr(negative, ir.Constant(bits.type, 1)))

    return bits(bits), code


@task
def row_max(x_S: Any, length: int) -> Any:
    """The largest of the first `length` numbers, compared as integers: that vectorises.

    A NaN stands above or below all numbers, by its sign. What is returned is then NaN or the largest
    number, and e^(x - largest) of the NaN itself is NaN in both cases: no softmax hides it.
    """
    highest = in_order(bits_of(x_S[0]))
    for j in range(1, length):
        highest = max(highest, in_order(bits_of(x_S[j])))
    return float_of(in_order(highest))


@reduction
def row_sum(x_S: Any, length: int) -> Any:
    """The sum of the first `length` numbers."""
    total = x_S.dtype.type(0)
    for j in range(length):
        total += x_S[j]
    return total


@reduction
def row_dot(x_S: Any, y_S: Any) -> Any:
    """The inner product of two rows."""
    total = x_S.dtype.type(0)
    for j in range(len(x_S)):
        total += x_S[j] * y_S[j]
    return total
