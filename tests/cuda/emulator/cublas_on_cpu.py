"""A stand-in for cuBLAS without a GPU: the functions that the backend calls, by NumPy on raw addresses.

They are C functions, declared here as NVIDIA's header has them, so that the backend's own declarations
and the order of its arguments count. They hold to BLAS: matrices by columns, leading dimensions that
suffice, C not read where beta is 0. With tf32's math mode inputs are rounded to it. A graph may record
a product only with a workspace that was given, and given after the stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_size_t, c_void_p
from typing import Any

import numpy as np

from tests.cuda.emulator import cupy_on_cpu

SUCCESS, NOT_INITIALIZED, ALLOC_FAILED, INVALID_VALUE, INTERNAL_ERROR = 0, 1, 3, 7, 14
NAMES = {
    SUCCESS: b"CUBLAS_STATUS_SUCCESS",
    NOT_INITIALIZED: b"CUBLAS_STATUS_NOT_INITIALIZED",
    ALLOC_FAILED: b"CUBLAS_STATUS_ALLOC_FAILED",
    INVALID_VALUE: b"CUBLAS_STATUS_INVALID_VALUE",
    INTERNAL_ERROR: b"CUBLAS_STATUS_INTERNAL_ERROR",
}
TF32_MATH = 3


class Library:
    """The library: `ctypes.CDLL` of it has these functions as attributes."""

    def __init__(self) -> None:
        self.fails_with: dict[str, int] = {}  # a status for each function that a test lets fail
        self.math_modes: list[int] = []  # of all products
        self._handles: dict[int, dict[str, int]] = {}

        def exported(result: Any, *types: Any) -> Callable[[Callable[..., Any]], Any]:
            return lambda function: ctypes.CFUNCTYPE(result, *types)(function)

        @exported(c_void_p, c_int)
        def status_string(status: int) -> int | None:
            return ctypes.cast(c_char_p(NAMES[status]), c_void_p).value

        @exported(c_int, POINTER(c_void_p))
        def create(handle: Any) -> int:
            if "cublasCreate_v2" in self.fails_with:
                return self.fails_with["cublasCreate_v2"]
            number = 1 + max(self._handles, default=0)
            self._handles[number] = {"math": 0}
            handle[0] = number
            return SUCCESS

        @exported(c_int, c_void_p)
        def destroy(handle: int) -> int:
            return SUCCESS if self._handles.pop(handle, None) else NOT_INITIALIZED

        @exported(c_int, c_void_p, c_void_p)
        def set_stream(handle: int, stream: int | None) -> int:
            self._handles[handle].pop("workspace", None)
            return SUCCESS

        @exported(c_int, c_void_p, c_void_p, c_size_t)
        def set_workspace(handle: int, address: int, size: int) -> int:
            if not address:
                return INVALID_VALUE
            self._handles[handle]["workspace"] = size
            return SUCCESS

        @exported(c_int, c_void_p, c_int)
        def set_math_mode(handle: int, mode: int) -> int:
            self._handles[handle]["math"] = mode
            return SUCCESS

        shape = (c_int, c_int, c_int, c_int, c_int)  # transa, transb, m, n, k

        def gemm(name: str, real: Any) -> Any:
            number = POINTER(real)

            @exported(
                *(c_int, c_void_p, *shape, number, c_void_p, c_int, c_void_p, c_int),
                *(number, c_void_p, c_int),
            )
            def function(handle: int, *arguments: Any) -> int:
                try:
                    return self.fails_with.get(f"{name}_v2") or self._gemm(
                        name, real, handle, *arguments
                    )
                except Exception:
                    return INTERNAL_ERROR

            return function

        self.cublasGetStatusString = status_string
        self.cublasCreate_v2, self.cublasDestroy_v2 = create, destroy
        self.cublasSetStream_v2, self.cublasSetWorkspace_v2 = set_stream, set_workspace
        self.cublasSetMathMode = set_math_mode
        self.cublasSgemm_v2, self.cublasDgemm_v2 = (
            gemm("cublasSgemm", c_float),
            gemm("cublasDgemm", c_double),
        )

    def _gemm(
        self,
        name: str,
        real: Any,
        handle: int,
        transa: int,
        transb: int,
        m: int,
        n: int,
        k: int,
        alpha: Any,
        a: int,
        lda: int,
        b: int,
        ldb: int,
        beta: Any,
        c: int,
        ldc: int,
    ) -> int:
        """C = alpha op(A) op(B) + beta C, C having m rows and n columns."""
        state = self._handles.get(handle)
        if state is None:
            return NOT_INITIALIZED
        if "workspace" not in state and cupy_on_cpu.cuda.Stream._current._recording is not None:
            return ALLOC_FAILED
        rows_a, rows_b = k if transa else m, n if transb else k
        if min(m, n, k) < 0 or {transa, transb} - {0, 1}:
            return INVALID_VALUE
        if lda < max(1, rows_a) or ldb < max(1, rows_b) or ldc < max(1, m):
            return INVALID_VALUE
        first = _by_columns(a, real, rows_a, m if transa else k, lda)
        second = _by_columns(b, real, rows_b, k if transb else n, ldb)
        out = _by_columns(c, real, m, n, ldc)
        dtype, rounds = out.dtype, real is c_float and state["math"] == TF32_MATH
        factor, kept = dtype.type(alpha[0]), dtype.type(beta[0])  # read when called, not when played
        self.math_modes.append(state["math"])

        def work() -> None:
            left, right = first.T if transa else first, second.T if transb else second
            if rounds:
                left, right = to_tf32(left), to_tf32(right)
            with np.errstate(all="ignore"):
                product = factor * (left @ right)
                out[...] = product if kept == 0 else product + kept * out

        cupy_on_cpu.enqueue(name, work)
        return SUCCESS


def _by_columns(address: int, real: Any, rows: int, columns: int, leading: int) -> np.ndarray:
    """The matrix at an address of the device."""
    size = leading * (columns - 1) + rows if columns else 0
    flat = np.ctypeslib.as_array((real * size).from_address(address))
    step = ctypes.sizeof(real)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (step, leading * step))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, halves away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


LIBRARY = Library()
real_open_library: list[Any] = []  # what opens NVIDIA's


def install() -> None:
    """Let the backend open this one; once CuPy's stand-in is in its place."""
    from mhmoe_np.operations.cuda import cublas

    real_open_library.append(cublas.open_library)
    cublas.open_library = lambda: LIBRARY
