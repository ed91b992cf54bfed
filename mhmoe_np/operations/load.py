"""Choosing a backend by name, and its threads."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName, Operations

if TYPE_CHECKING:
    from mhmoe_np.settings.run import Matmul

MOST_THREADS = 4096  # more than any machine's cores; Numba would start them all
THREADING_LAYERS = ("default", "safe", "threadsafe", "forksafe", "tbb", "omp", "workqueue")


def cores() -> int:
    """How many threads can run at once: the cores this process may use, or NUMBA_NUM_THREADS.

    Raises UserError: NUMBA_NUM_THREADS is no such number.
    """
    wanted = os.environ.get("NUMBA_NUM_THREADS")
    if wanted:
        if not re.fullmatch("[0-9]{1,9}", wanted) or not 1 <= int(wanted) <= MOST_THREADS:
            raise UserError(
                f"NUMBA_NUM_THREADS={wanted[:60]}: must be a number from 1 to {MOST_THREADS}; unset it"
            )
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def load_operations(
    name: BackendName,
    *,
    threads: int | None = None,
    keep_buffers: bool = False,
    matmul: Matmul = "float32",
) -> Operations:
    """The operations of one backend, on `threads` threads (None: one for each core).

    keep_buffers: not for numpy; hand results out of a workspace that is reused (see `Workspace`). Leave
    it off unless the caller wraps its work in `scope()` and uses up every result inside.

    matmul: how float32 products are computed; other than as such by cuda alone.

    Threads are a property of the process: the last call holds for all.

    Numba and CuPy are imported here and not before: the others and the help texts do without them.

    Raises UserError: more threads than there are, the environment has settings of Numba's that it
    cannot work with, or there is no GPU to run on.
    """
    available = cores()
    if threads is not None and not 1 <= threads <= available:
        raise UserError(f"--threads {threads}: this machine offers 1 to {available}")
    if name == "cuda":
        from mhmoe_np.operations.cuda.driver import load

        return load(keep_buffers=keep_buffers, matmul=matmul)
    if matmul != "float32":
        raise UserError(
            f"--set training.matmul={matmul}: --backend cuda alone computes so; set it to float32"
        )
    if name == "numpy":
        from mhmoe_np.operations import numpy_ref

        # In a source tree alone, without the library, BLAS keeps the threads that it has.
        with suppress(ModuleNotFoundError):
            from threadpoolctl import threadpool_limits

            threadpool_limits(threads or available, user_api="blas")
        return numpy_ref
    import_numba_backend()
    from mhmoe_np.operations.numba_cpu import NumbaOperations

    try:
        # A number, always: setting it starts the threads, here and not within a kernel.
        return NumbaOperations(threads=threads or available, keep_buffers=keep_buffers)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{reason} (Numba); unset NUMBA_THREADING_LAYER and NUMBA_THREADING_LAYER_PRIORITY"
        ) from None


def import_numba_backend() -> None:
    """Import the Numba backend; what its environment variables hold is checked on the way.

    Raises UserError: one holds what Numba or the compiler cannot take. Left to them, that would be a
    warning of many lines, an error without the variable's name, or the end of the process.
    """
    cores()
    layer = os.environ.get("NUMBA_THREADING_LAYER") or "default"
    if layer not in THREADING_LAYERS:
        raise UserError(
            f"{_set('NUMBA_THREADING_LAYER')}: must be one of {', '.join(THREADING_LAYERS)}; unset it"
        )
    if not re.fullmatch(r"([+-][\w.-]+(,|$))*", os.environ.get("NUMBA_CPU_FEATURES") or ""):
        raise UserError(
            f"{_set('NUMBA_CPU_FEATURES')}: must be features like +avx2,-fma joined by commas; unset it"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Environment variable", RuntimeWarning)
        try:
            importlib.import_module("mhmoe_np.operations.numba_cpu")
        except RuntimeWarning as warning:
            reason = str(warning).partition("\n")[0].rstrip(".")
            raise UserError(f"{reason}; correct or unset it") from None
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                raise
            raise UserError(
                f"{_set('NUMBA_CACHE_DIR')}: no folder to keep compiled kernels in; name one that can "
                "be written"
            ) from None


def _set(variable: str) -> str:
    """How an environment variable is set, cut where it is long."""
    return f"{variable}={os.environ.get(variable, '')[:60]}"
