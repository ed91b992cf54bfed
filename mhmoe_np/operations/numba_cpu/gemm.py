"""Single-threaded matrix products inside compiled code, on any row strides.

Kernels call BLAS by two symbols of ours, which are bound to the chosen library's functions when this
module is imported, before any kernel is loaded: what was compiled once runs with every library. Called
directly, BLAS takes strided blocks and accumulates, where Numba's `np.dot` would copy and overwrite.
`limit_blas` keeps BLAS itself on one thread: the tasks are the parallelism.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import types
from numba.core import cgutils
from threadpoolctl import ThreadpoolController

from mhmoe_np.operations.numba_cpu.blas_choice import choose
from mhmoe_np.operations.numba_cpu.compiling import task, typed_intrinsic
from mhmoe_np.operations.numba_cpu.few_rows import few_rows_nt

BLAS = choose()
SYMBOLS = {types.float32: "mhmoe_np_sgemm", types.float64: "mhmoe_np_dgemm"}
add_symbol(SYMBOLS[types.float32], BLAS.sgemm)
add_symbol(SYMBOLS[types.float64], BLAS.dgemm)


def limit_blas() -> None:
    """Keep every BLAS of this process on one thread from now on."""
    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        library.set_num_threads(1)


@typed_intrinsic
def _fortran_gemm(
    _typing: Any,
    trans_a: Any, trans_b: Any, m: Any, n: Any, k: Any,
    alpha: Any, a: Any, lda: Any, b: Any, ldb: Any, beta: Any, c: Any, ldc: Any,
) -> Any:  # fmt: skip
    """BLAS's own call, column-major: every argument by its address.

    Integers go as 64 bits, whose lower half is what a library with integers of 32 reads: both are
    the same number on a little-endian processor.
    """
    letter, size, number = types.uint8, types.int64, c.dtype
    signature = types.void(
        letter, letter, size, size, size, number, a, size, b, size, number, c, size
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointers = [
            context.make_array(kind)(context, builder, value).data
            if isinstance(kind, types.Array)
            else cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]
            for kind, value in zip(signature.args, values, strict=True)
        ]
        pointers = [builder.bitcast(pointer, cgutils.voidptr_t) for pointer in pointers]
        kind = ir.FunctionType(ir.VoidType(), [pointer.type for pointer in pointers])
        name = SYMBOLS[number]
        gemm = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        builder.call(gemm, pointers)
        return context.get_dummy_value()

    return signature, generate


@task
def _gemm(trans_a: Any, trans_b: Any, alpha: Any, a: Any, b: Any, beta: Any, c: Any) -> None:
    """c = alpha op(a) op(b) + beta c, where op transposes or not."""
    m, n = c.shape
    k = a.shape[0] if trans_a == _T else a.shape[1]
    # A row-major product is a column-major one of the transposes, in the other order. The stride
    # of a single row is arbitrary in NumPy; BLAS wants at least the row's length, and at least 1.
    _fortran_gemm(
        trans_b, trans_a, n, m, k,
        alpha, b, max(b.strides[0] // b.itemsize, b.shape[1], 1),
        a, max(a.strides[0] // a.itemsize, a.shape[1], 1),
        beta, c, max(c.strides[0] // c.itemsize, c.shape[1], 1),
    )  # fmt: skip


_N, _T = ord("n"), ord("t")


@task
def gemm_nt(alpha: Any, a_NI: Any, b_OI: Any, beta: Any, c_NO: Any) -> None:
    """c = alpha a b^T + beta c; with beta = 0, c may hold anything."""
    _gemm(_N, _T, alpha, a_NI, b_OI, beta, c_NO)


@task
def gemm_nn(alpha: Any, a_NO: Any, b_OI: Any, beta: Any, c_NI: Any) -> None:
    """c = alpha a b + beta c."""
    _gemm(_N, _N, alpha, a_NO, b_OI, beta, c_NI)


@task
def gemm_tn(alpha: Any, a_NO: Any, b_NI: Any, beta: Any, c_OI: Any) -> None:
    """c = alpha a^T b + beta c."""
    _gemm(_T, _N, alpha, a_NO, b_NI, beta, c_OI)


# Up to so many rows BLAS, which first copies the whole matrix into its own order, is slower than
# reading it once: on an AMD EPYC with AVX2 1.3 GFLOP/s against 44 for one row, 21 against 74 for 8 and
# 27 against 53 for 16; at 48 rows they are equal.
FEW_ROWS = 16


@task
def product_nt(x_NI: Any, w_OI: Any, y_NO: Any) -> None:
    """y = x w^T, dot by dot where rows are few."""
    if x_NI.shape[0] > FEW_ROWS:
        gemm_nt(1.0, x_NI, w_OI, 0.0, y_NO)
    else:
        few_rows_nt(x_NI, w_OI, y_NO)
