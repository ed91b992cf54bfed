"""cuBLAS itself, by ctypes: products of matrices that a graph may record.

CuPy's own binding refuses while a graph is recorded, and leaves the workspace to cuBLAS.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import cupy

from mhmoe_np.errors import UserError
from mhmoe_np.settings.run import Matmul

# What NVIDIA recommends for Hopper; smaller devices need less. Given by us, and used by one stream, it
# makes results the same bits in every run, and a recorded product finds it where it was.
WORKSPACE_BYTES = 32 << 20

SUCCESS, ALLOC_FAILED = 0, 3
PLAIN, TRANSPOSED = 0, 1
DEFAULT_MATH, TF32_MATH = 0, 3

_GEMM = (c_void_p, c_int, c_int, c_int, c_int, c_int)
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (POINTER(c_void_p),),
    "cublasDestroy_v2": (c_void_p,),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasSetMathMode": (c_void_p, c_int),
    **{
        name: (*_GEMM, POINTER(real), c_void_p, c_int, c_void_p, c_int, POINTER(real), c_void_p, c_int)
        for name, real in (("cublasSgemm_v2", c_float), ("cublasDgemm_v2", c_double))
    },
}
GEMM_OF: dict[str, tuple[str, Any]] = {
    "float32": ("cublasSgemm_v2", c_float),
    "float64": ("cublasDgemm_v2", c_double),
}


def open_library() -> Any:
    """The library.

    Raises UserError: there is none.
    """
    for place in _places():
        with suppress(OSError):
            return ctypes.CDLL(place)
    raise UserError(
        "--backend cuda needs cuBLAS, and no libcublas.so was found; "
        "pip install 'cupy-cuda13x[ctk]', or nvidia-cublas beside CuPy"
    )


def _places() -> Iterator[str]:
    """Where it may be, CuPy's version of CUDA first."""
    with suppress(ImportError, RuntimeError):  # the latter: not found
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib("cublas").abs_path
        if found:
            yield found
    own = cupy.cuda.runtime.runtimeGetVersion() // 1000
    names = [f"libcublas.so.{version}" for version in (own, *({12, 13} - {own}))]
    yield from names
    for name in names:
        for folder in sys.path:
            yield from map(str, sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}")))


class Cublas:
    """A handle of the library: on one stream, with a workspace of its own."""

    def __init__(self, stream: Any, workspace: Any, *, matmul: Matmul) -> None:
        """workspace: bytes of the device, which stay.

        Raises UserError: there is no library; the environment has tf32 where float32 is wanted.
        """
        # Under DEFAULT_MATH cuBLAS multiplies float32 as float32, unless this variable says otherwise.
        override = os.environ.get("NVIDIA_TF32_OVERRIDE", "0")
        if matmul != "tf32" and override != "0":
            raise UserError(
                f"NVIDIA_TF32_OVERRIDE={override[:60]}: float32 would be multiplied as tf32; unset it"
            )
        self._library = open_library()
        for name, types in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, c_int
        self._library.cublasGetStatusString.argtypes = (c_int,)
        self._library.cublasGetStatusString.restype = c_char_p

        self._handle = c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        # Not when Python ends: the device may be gone by then.
        weakref.finalize(self, self._library.cublasDestroy_v2, self._handle).atexit = False
        self._call("cublasSetStream_v2", self._handle, stream.ptr)  # which takes a workspace away
        self._workspace = workspace
        self._call("cublasSetWorkspace_v2", self._handle, workspace.data.ptr, workspace.nbytes)
        self._math = DEFAULT_MATH

    def gemm(
        self,
        a: Any,
        b: Any,
        out: Any,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
        tf32: bool = False,
    ) -> None:
        """out = alpha * a @ b + beta * out, a and b transposed where so said; beta 0: out is not read.

        Rows may lie further apart than they are long. tf32: float32 may be multiplied as tf32.

        To cuBLAS a matrix lies by columns, and ours are their own transposes: what it computes is
        out^T = b^T @ a^T.
        """
        M, N = out.shape
        K, left = a.shape if transpose_a else a.shape[::-1]
        right, inner = b.shape if transpose_b else b.shape[::-1]
        if (left, right, inner) != (M, N, K):
            raise ValueError(f"no product: {a.shape}, {b.shape} to {out.shape}")
        if not a.dtype == b.dtype == out.dtype:
            raise TypeError(f"no product: {a.dtype}, {b.dtype} to {out.dtype}")
        if out.size == 0:
            return
        if K == 0:
            if beta != 1:
                raise ValueError("a sum of nothing can only be added")
            return
        name, real = GEMM_OF[out.dtype.name]
        self._set_math(TF32_MATH if tf32 and real is c_float else DEFAULT_MATH)
        self._call(
            name,
            self._handle,
            TRANSPOSED if transpose_b else PLAIN,
            TRANSPOSED if transpose_a else PLAIN,
            N,
            M,
            K,
            ctypes.byref(real(alpha)),
            b.data.ptr,
            _row_step(b),
            a.data.ptr,
            _row_step(a),
            ctypes.byref(real(beta)),
            out.data.ptr,
            _row_step(out),
        )

    def _set_math(self, mode: int) -> None:
        if mode != self._math:
            self._call("cublasSetMathMode", self._handle, mode)
            self._math = mode

    def _call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError: cuBLAS refuses; UserError: for want of memory."""
        status = getattr(self._library, name)(*arguments)
        if status == SUCCESS:
            return
        reason = self._library.cublasGetStatusString(status).decode()
        if status == ALLOC_FAILED:
            raise UserError(
                f"--backend cuda: {reason}: the device's memory does not suffice; make the model or "
                "the batch smaller, or raise training.gradient_accumulation_steps"
            )
        raise RuntimeError(f"{name}: {reason}")


def _row_step(matrix: Any) -> int:
    """How many numbers lie between one row's first and the next's: the leading dimension."""
    rows, columns = matrix.shape
    if columns > 1 and matrix.strides[1] != matrix.dtype.itemsize:
        raise ValueError("a product takes matrices with a contiguous last axis alone")
    # With a single row the stride says nothing.
    return max(1, columns if rows == 1 else matrix.strides[0] // matrix.dtype.itemsize)
