"""Single matrix products of the two sizes: ours and those of each BLAS, on one thread.

    python -m benchmarks.products [--seconds 0.5] [--json]

Float32, by turns in short bursts, the fastest call of each, by the processor time of the thread: what
others take of the machine in between is not counted. With MKL also its packed operands, that is
`cblas_sgemm_pack` and `compute`: the second matrix, a weight, is packed once, outside the time that is
measured, and what packing takes is measured by itself. Writes `products.json` into the folder of the
machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.machines import described, folder_of, machine, write_results
from benchmarks.packed import fastest
from mhmoe_np.operations.numba_cpu.blas_choice import those_there
from mhmoe_np.operations.numba_cpu.blas_libraries import (
    Form,
    Library,
    load_mkl,
    mkl_libraries,
    product,
)

FILE = "products"
# Of MKL's headers.
ROW_MAJOR, NO_TRANS, TRANS, PACKED, B_MATRIX = 101, 111, 112, 151, 162

Call = Callable[[], None]


class Shape(NamedTuple):
    """One product: c, rows by outputs, sums over `inputs` numbers."""

    name: str
    form: Form
    rows: int
    outputs: int
    inputs: int


SHAPES = (
    Shape("A: expert, gate and up", "nt", 256, 352, 128),
    Shape("A: expert, down", "nt", 256, 128, 176),
    Shape("A: expert, weight gradient", "tn", 352, 128, 256),
    Shape("A: query, key, value", "nt", 2048, 768, 256),
    Shape("A: strip of the head", "nt", 1024, 1024, 256),
    Shape("B: expert, gate and up", "nt", 256, 1536, 384),
    Shape("B: expert, down", "nt", 256, 384, 768),
    Shape("B: expert, weight gradient", "tn", 1536, 384, 1024),
    Shape("B: strip of the head", "nt", 1024, 1024, 768),
    Shape("attention: scores", "nt", 128, 256, 64),
    Shape("attention: values", "nn", 128, 64, 256),
    Shape("square", "nn", 2048, 2048, 2048),
)


class Operands(NamedTuple):
    """The two factors of a product as they lie in memory, and room for it."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def operands(shape: Shape) -> Operands:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int, transposed: bool) -> np.ndarray:
        size = (columns, rows) if transposed else (rows, columns)
        return rng.standard_normal(size, dtype=np.float32)

    return Operands(
        matrix(shape.rows, shape.inputs, shape.form[0] == "t"),
        matrix(shape.inputs, shape.outputs, shape.form[1] == "t"),
        np.empty((shape.rows, shape.outputs), np.float32),
    )


def packed_calls(library: ctypes.CDLL, shape: Shape, given: Operands) -> tuple[Call, Call]:
    """Packing b, and the product with b packed."""
    sizes = [ctypes.c_int(size) for size in (shape.rows, shape.outputs, shape.inputs)]
    trans_a, trans_b = (TRANS if letter == "t" else NO_TRANS for letter in shape.form)
    library.cblas_sgemm_pack_get_size.restype = ctypes.c_size_t
    room = np.empty(library.cblas_sgemm_pack_get_size(B_MATRIX, *sizes), np.uint8)
    a, b, c, packed = (ctypes.c_void_p(array.ctypes.data) for array in (*given, room))
    lda, ldb, ldc = (ctypes.c_int(array.shape[1]) for array in given)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)

    def pack() -> None:
        library.cblas_sgemm_pack(ROW_MAJOR, B_MATRIX, trans_b, *sizes, one, b, ldb, packed)

    def compute(kept: object = (given, room)) -> None:
        library.cblas_sgemm_compute(
            *(ROW_MAJOR, trans_a, PACKED, *sizes, a, lda, packed, ldb, zero, c, ldc)
        )

    return pack, compute


def measure(shape: Shape, libraries: list[Library], seconds: float) -> dict[str, Any]:
    """A row: GFLOP/s of each library.

    Raises SystemExit: one computes something else than NumPy.
    """
    given = operands(shape)
    calls: dict[str, Call] = {
        library.name: product(library, shape.form, *given) for library in libraries
    }
    if "mkl" in calls:
        pack, compute = packed_calls(load_mkl(mkl_libraries()), shape, given)
        pack()
        calls |= {"mkl_packed": compute, "packing": pack}
    a, b = (
        factor.T if letter == "t" else factor for factor, letter in zip(given, shape.form, strict=False)
    )
    expected = a.astype(np.float64) @ b
    for name, call in calls.items():
        given.c[...] = np.nan
        call()
        if name != "packing" and not np.allclose(given.c, expected, rtol=0, atol=1e-3):
            raise SystemExit(f"{name} does not compute {shape.name}")
    best = fastest(dict(calls), seconds, time.thread_time)
    operations = 2e-9 * shape.rows * shape.outputs * shape.inputs
    rates = {name: round(operations / spent, 1) for name, spent in best.items() if name != "packing"}
    packing = {"packing_us": round(1e6 * best["packing"], 1)} if "packing" in best else {}
    return {**shape._asdict(), **rates, **packing}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    libraries = those_there()
    names = {library.name: described(library.blas()._asdict()) for library in libraries}
    rows = []
    with threadpool_limits(1, user_api="blas"):
        for shape in SHAPES:
            rows.append(measure(shape, libraries, arguments.seconds))
            if not arguments.json:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    found = {"machine": machine(), "libraries": names, "rows": rows}
    write_results(folder_of(found["machine"]), FILE, found)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
