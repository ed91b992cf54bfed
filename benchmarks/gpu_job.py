"""What every section of `benchmarks.gpu` works with: the backend, the clock, the models."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sizes import GPU_SIZES, benchmark_config
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig

Row = dict[str, Any]
BATCHES = 4  # different ones, in turn


def cuda_operations(**options: Any) -> Operations:
    """The backend as a training run has it."""
    return load_operations("cuda", keep_buffers=True, **options)


class Job(NamedTuple):
    """How a section measures."""

    seconds: float = 2.0  # about so long is a measurement
    operations: Callable[..., Operations] = cuda_operations
    torch_device: str = "cuda"
    folder: Path | None = None  # where initial parameters are kept for the next section
    decoded: int = 128  # tokens in a row


def parameters_of(job: Job, size: str, model: str) -> Parameters:
    """The initial parameters that both sides start from."""
    parameters = Parameters(benchmark_config(size, model), np.float32)
    kept = job.folder / f"{size}-{model}.npy" if job.folder else None
    if kept is not None and kept.exists():
        parameters.flat_P[...] = np.load(kept, mmap_mode="r")
    else:
        initialise(parameters, seed=0)
        if kept is not None:
            np.save(kept, parameters.flat_P)
    return parameters


def batches_of(size: str, config: ModelConfig) -> np.ndarray:
    """Token ids [batches, B, T+1]."""
    shape = (BATCHES, GPU_SIZES[size].batch, config.max_position_embeddings + 1)
    return np.random.default_rng(0).integers(0, config.vocab_size, shape)


def rate(call: Callable[[], object], synchronise: Callable[[], object], seconds: float) -> float:
    """Seconds of a call by the host's clock; the device is waited for at the end of a row of calls."""
    # Each batch once: from then on all is compiled, recorded and allocated.
    for _ in range(BATCHES):
        call()
    synchronise()
    calls, spent = 0, 0.0
    while spent < seconds or calls < 2:
        more, start = max(1, min(calls, 64)), time.perf_counter()
        for _ in range(more):
            call()
        synchronise()
        spent += time.perf_counter() - start
        calls += more
    return spent / calls


def free() -> None:
    """Give back to the device what no array holds any more."""
    gc.collect()
    import cupy

    if hasattr(cupy, "get_default_memory_pool"):
        cupy.get_default_memory_pool().free_all_blocks()
