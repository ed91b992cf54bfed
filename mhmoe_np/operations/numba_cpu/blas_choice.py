"""Which BLAS compiled kernels multiply with: decided once a process.

MHMOE_NP_BLAS names one. Without it MKL, where it is installed, runs on Intel's processors, and OpenBLAS
on AMD's, where it is faster with large matrices (`benchmarks.products`); on any other one a probe
decides, and what came out is kept beside the kernels.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from mhmoe_np.errors import UserError
from mhmoe_np.extras import missing
from mhmoe_np.operations.blas import VARIABLE, BlasName
from mhmoe_np.operations.numba_cpu.blas_libraries import (
    Library,
    mkl,
    mkl_libraries,
    openblas,
    product,
)
from mhmoe_np.operations.numba_cpu.kernel_cache import ROOT
from mhmoe_np.operations.processor import processor, processor_facts
from mhmoe_np.storage.files import write_atomically, write_json

FASTER_ON: Mapping[str, BlasName] = {"GenuineIntel": "mkl", "AuthenticAMD": "openblas"}
PROBE = ROOT / "mhmoe-np-blas.json"
PROBE_SHAPES = ((256, 352, 128), (256, 256, 1024))  # rows, outputs, inputs: an expert's products
PROBE_REPEATS = 5


def choose() -> Library:
    """The library that MHMOE_NP_BLAS names, or the faster one of those that are installed.

    Raises UserError: the variable names none, or one that is not installed or cannot be loaded.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, "openblas", "mkl"):
        raise UserError(f"{VARIABLE}={wanted[:60]}: must be openblas or mkl; unset it")
    likely = wanted or FASTER_ON.get(processor_facts().get("vendor_id", ""))
    if likely == "openblas":
        return openblas()
    installed = mkl_libraries()
    if not installed and wanted:
        raise missing("mkl", extra="mkl", needed_by=f"{VARIABLE}=mkl", otherwise=", or unset it")
    if not installed:
        return openblas()
    try:
        library = mkl(installed)
    except OSError as error:
        if wanted:
            raise UserError(f"{VARIABLE}=mkl: {error}; install mkl again, or unset it") from None
        return openblas()
    return library if likely else faster(openblas(), library, PROBE)


def faster(first: Library, second: Library, kept: Path) -> Library:
    """The one of two libraries that multiplies an expert's matrices faster on this processor.

    kept: the file that holds what came out the last time. It is asked first, and written where it is
    of another processor or other versions.
    """
    libraries = {library.name: library for library in (first, second)}
    case = {"processor": processor()} | {
        name: list(library.blas()) for name, library in libraries.items()
    }
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["case"] == case:
            return libraries[found["faster"]]
    chosen = min(libraries.values(), key=_probe)
    outcome = {"case": case, "faster": chosen.name}
    with suppress(OSError):  # the next process probes again
        write_atomically(kept, partial(write_json, value=outcome))
    return chosen


def _probe(library: Library) -> float:
    """Seconds, each product's shortest."""
    rng, total = np.random.default_rng(0), 0.0
    with threadpool_limits(1, user_api="blas"):
        for rows, outputs, inputs in PROBE_SHAPES:
            a_NI, b_OI = (
                rng.standard_normal((size, inputs), dtype=np.float32) for size in (rows, outputs)
            )
            call = product(library, "nt", a_NI, b_OI, np.empty((rows, outputs), np.float32))
            call()
            times = []
            for _ in range(PROBE_REPEATS):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            total += min(times)
    return total
