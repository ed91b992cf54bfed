"""What compiled kernels multiply float32 matrices with: decided once a process.

MHMOE_NP_BLAS names it. Without it our own products run on AMD's processors with AVX2, where they are
the fastest (`benchmarks.products`); on any other one a probe decides among those that are there, and
what came out is kept beside the kernels.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from mhmoe_np.errors import UserError
from mhmoe_np.extras import missing
from mhmoe_np.operations.blas import VARIABLE
from mhmoe_np.operations.numba_cpu import own_product
from mhmoe_np.operations.numba_cpu.blas_libraries import (
    Form,
    Library,
    mkl,
    mkl_libraries,
    openblas,
    own,
    product,
)
from mhmoe_np.operations.numba_cpu.kernel_cache import ROOT
from mhmoe_np.operations.processor import processor, processor_facts
from mhmoe_np.storage.files import write_atomically, write_json

OWN_IS_FASTEST = {("AuthenticAMD", "AVX2")}
PROBE = ROOT / "mhmoe-np-blas.json"
# Form, rows, outputs, inputs: an expert's products and weight gradient, and attention's scores.
PROBE_SHAPES: tuple[tuple[Form, int, int, int], ...] = (
    ("nt", 256, 352, 128),
    ("nt", 256, 256, 512),
    ("tn", 352, 128, 256),
    ("nt", 64, 256, 64),
)
PROBE_ROUNDS = 12


def choose() -> Library:
    """The library that MHMOE_NP_BLAS names, or the fastest one of those that are there.

    Raises UserError: the variable names none, or one that is not installed or cannot be loaded.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is not None:
        return _named(wanted)
    here = processor_facts().get("vendor_id"), own_product.ARCHITECTURE
    if own_product.available() and here in OWN_IS_FASTEST:
        return own()
    libraries = those_there()
    return fastest(libraries, PROBE) if len(libraries) > 1 else libraries[0]


def those_there() -> list[Library]:
    """OpenBLAS; our products, where the processor can; MKL, where it is installed and can be loaded."""
    libraries = [openblas()]
    if own_product.available():
        libraries.append(own())
    if installed := mkl_libraries():
        with suppress(OSError):
            libraries.append(mkl(installed))
    return libraries


def _named(wanted: str) -> Library:
    """The library of this name.

    Raises UserError: see `choose`.
    """
    if wanted == "openblas":
        return openblas()
    if wanted == "own":
        if not own_product.available():
            raise UserError(
                f"{VARIABLE}=own: this processor lacks AVX2 or FMA; unset it, or set it to openblas"
            )
        return own()
    if wanted != "mkl":
        raise UserError(f"{VARIABLE}={wanted[:60]}: must be own, openblas or mkl; unset it")
    installed = mkl_libraries()
    if not installed:
        raise missing("mkl", extra="mkl", needed_by=f"{VARIABLE}=mkl", otherwise=", or unset it")
    try:
        return mkl(installed)
    except OSError as error:
        raise UserError(f"{VARIABLE}=mkl: {error}; install mkl again, or unset it") from None


def fastest(candidates: list[Library], kept: Path) -> Library:
    """The library that multiplies an expert's and attention's matrices fastest on this processor.

    kept: the file that holds what came out the last time. It is asked first, and written where it is
    of another processor or other versions.
    """
    libraries = {library.name: library for library in candidates}
    case = {"processor": processor()} | {
        name: list(library.blas()) for name, library in libraries.items()
    }
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["case"] == case:
            return libraries[found["fastest"]]
    seconds = _probe(candidates)
    chosen = candidates[seconds.index(min(seconds))]
    outcome = {"case": case, "fastest": chosen.name}
    with suppress(OSError):  # the next process probes again
        write_atomically(kept, partial(write_json, value=outcome))
    return chosen


def _probe(libraries: list[Library]) -> list[float]:
    """Seconds of each library, each product's shortest.

    They take turns: on a machine that others use they are a few per cent apart, and whole milliseconds
    are slower than others.
    """
    rng, totals = np.random.default_rng(0), np.zeros(len(libraries))
    with threadpool_limits(1, user_api="blas"):
        for form, rows, outputs, inputs in PROBE_SHAPES:
            shape_a = (inputs, rows) if form == "tn" else (rows, inputs)
            shape_b = (outputs, inputs) if form == "nt" else (inputs, outputs)
            a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in (shape_a, shape_b))
            c = np.empty((rows, outputs), np.float32)
            calls = [product(library, form, a, b, c) for library in libraries]
            times = np.array([[_seconds(call) for call in calls] for _ in range(1 + PROBE_ROUNDS)])
            totals += times[1:].min(axis=0)
    return totals.tolist()


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
