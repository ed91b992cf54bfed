"""Single-threaded matrix products inside compiled code, on any row strides.

Numba reaches BLAS through `numba_xxgemm`, the function behind its own `np.dot`; called directly it
takes strided blocks and accumulates, where `np.dot` would copy and overwrite. `limit_blas` keeps BLAS
itself on one thread: the tasks are the parallelism.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from threadpoolctl import ThreadpoolController

from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.few_rows import few_rows_nt
from mhmoe_np.operations.numba_cpu.scipy_blas import cython_blas  # noqa: F401  where Numba finds BLAS


def limit_blas() -> None:
    """Keep every BLAS of this process on one thread from now on."""
    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        library.set_num_threads(1)


def _external(dtype: Any) -> Any:
    """Numba's door to BLAS's product of two matrices."""
    pointer = types.CPointer(dtype)  # type: ignore[no-untyped-call]
    signature: Any = types.intc
    return types.ExternalFunction(
        "numba_xxgemm",
        signature(
            types.char,  # kind: s or d
            types.char,  # n or t, first matrix
            types.char,  # n or t, second matrix
            types.intp,  # m
            types.intp,  # n
            types.intp,  # k
            pointer,  # alpha
            pointer,  # a
            types.intp,  # lda
            pointer,  # b
            types.intp,  # ldb
            pointer,  # beta
            pointer,  # c
            types.intp,  # ldc
        ),
    )


_GEMM = {types.float32: (ord("s"), _external(types.float32)),
         types.float64: (ord("d"), _external(types.float64))}  # fmt: skip


def _xxgemm(trans_a: Any, trans_b: Any, alpha: Any, a: Any, b: Any, beta: Any, c: Any) -> None:
    """c = alpha op(a) op(b) + beta c, where op transposes or not."""
    raise NotImplementedError("compiled code only")


@overload(_xxgemm)
def _compiled_xxgemm(trans_a: Any, trans_b: Any, alpha: Any, a: Any, b: Any, beta: Any, c: Any) -> Any:
    kind, external = _GEMM[a.dtype]

    def call(trans_a: Any, trans_b: Any, alpha: Any, a: Any, b: Any, beta: Any, c: Any) -> None:
        m, n = c.shape
        k = a.shape[0] if trans_a == _T else a.shape[1]
        alpha_1 = np.full(1, alpha, a.dtype)
        beta_1 = np.full(1, beta, a.dtype)
        # A row-major product is a column-major one of the transposes, in the other order. The stride
        # of a single row is arbitrary in NumPy; BLAS wants at least the row's length.
        external(
            kind, trans_b, trans_a, n, m, k,
            alpha_1.ctypes,
            b.ctypes, max(b.strides[0] // b.itemsize, b.shape[1]),
            a.ctypes, max(a.strides[0] // a.itemsize, a.shape[1]),
            beta_1.ctypes,
            c.ctypes, max(c.strides[0] // c.itemsize, c.shape[1]),
        )  # fmt: skip

    return call


_N, _T = ord("n"), ord("t")


@task
def gemm_nt(alpha: Any, a_NI: Any, b_OI: Any, beta: Any, c_NO: Any) -> None:
    """c = alpha a b^T + beta c; with beta = 0, c may hold anything."""
    _xxgemm(_N, _T, alpha, a_NI, b_OI, beta, c_NO)


@task
def gemm_nn(alpha: Any, a_NO: Any, b_OI: Any, beta: Any, c_NI: Any) -> None:
    """c = alpha a b + beta c."""
    _xxgemm(_N, _N, alpha, a_NO, b_OI, beta, c_NI)


@task
def gemm_tn(alpha: Any, a_NO: Any, b_NI: Any, beta: Any, c_OI: Any) -> None:
    """c = alpha a^T b + beta c."""
    _xxgemm(_T, _N, alpha, a_NO, b_NI, beta, c_OI)


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
