"""The libraries that compiled code can multiply matrices with, by the addresses of their functions.

`own` are our products, in float32; `openblas` is the BLAS that SciPy brings, by whatever name; `mkl` is
Intel's, where the package `mkl` is installed. All are called as from Fortran, every argument by its
address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_np.operations.blas import BlasName, blas_of
from mhmoe_np.operations.numba_cpu import own_product
from mhmoe_np.operations.numba_cpu.private_library import load_privately
from mhmoe_np.operations.numba_cpu.scipy_blas import address_of
from mhmoe_np.operations.table import Blas
from mhmoe_np.types import FloatArray

Form = Literal["nt", "nn", "tn"]
"""Which of two factors is transposed."""

# Its Fortran calls with integers of 32 bits, no threads of its own, and what both stand on.
MKL_LIBRARIES = ("libmkl_intel_lp64", "libmkl_sequential", "libmkl_core")
MKL_CBWR_AUTO = 2  # of its headers: the fastest kernels whose sums do not depend on alignment


class Library(NamedTuple):
    """A library of products, on one thread."""

    name: BlasName
    sgemm: int  # the function's address
    dgemm: int

    def blas(self) -> Blas:
        """How it calls itself."""
        if self.name == "own":
            return Blas("own", version("mhmoe-np"), own_product.ARCHITECTURE)
        return Blas("mkl", version("mkl"), None) if self.name == "mkl" else blas_of("scipy")


@cache
def openblas() -> Library:
    """SciPy's BLAS, from where Numba takes it too."""
    return Library("openblas", address_of("sgemm"), address_of("dgemm"))


@cache
def own() -> Library:
    """Our products in float32; those in float64 are OpenBLAS's. It is compiled where it never was."""
    dgemm = openblas().dgemm  # first: else Numba imports all of SciPy's linear algebra to look for it
    return Library("own", own_product.sgemm_address(), dgemm)


def mkl_libraries() -> tuple[Path, ...]:
    """The libraries of the package `mkl` that multiply on one thread; empty: it is not installed."""
    try:
        files = distribution("mkl").files or []
    except PackageNotFoundError:
        return ()
    found = [
        [Path(str(file.locate())) for file in files if file.name.startswith(f"{name}.so")]
        for name in MKL_LIBRARIES
    ]
    return tuple(paths[0] for paths in found) if all(found) else ()


@cache
def load_mkl(libraries: tuple[Path, ...]) -> ctypes.CDLL:
    """MKL, told to give the same bits wherever operands lie.

    Raises OSError: it cannot be loaded.
    """
    library = load_privately(libraries)
    library.MKL_CBWR_Set(MKL_CBWR_AUTO)
    return library


def mkl(libraries: tuple[Path, ...]) -> Library:
    """MKL's products.

    Raises OSError: see `load_mkl`.
    """
    library = load_mkl(libraries)
    return Library("mkl", _address(library.sgemm_), _address(library.dgemm_))


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def product(
    library: Library, form: Form, a: FloatArray, b: FloatArray, c: FloatArray
) -> Callable[[], None]:
    """A call without arguments that computes c = a b in float32, each factor transposed as `form` says.

    It is there to be measured; all three are C-contiguous.
    """
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(library.sgemm)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    trans_a, trans_b = (np.frombuffer(letter.encode(), np.uint8) for letter in form)
    inputs = a.shape[0] if form == "tn" else a.shape[1]
    n, m, k, lda, ldb = (
        np.array([size], np.int64) for size in (c.shape[1], len(c), inputs, a.shape[1], b.shape[1])
    )
    # Row-major arrays are their own transposes to Fortran: the other order, and c's rows are n long.
    arrays: list[Any] = [trans_b, trans_a, n, m, k, one, b, ldb, a, lda, zero, c, n]
    pointers = [array.ctypes.data for array in arrays]

    def call(kept: object = arrays) -> None:
        function(*pointers)

    return call
