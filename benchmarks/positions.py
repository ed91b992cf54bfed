"""Does a generated token cost more the more was generated before it? (`benchmarks.decode --positions`)

Decodes token by token with the key-value cache and prints the median milliseconds of a token in windows
along the way: what grows is attention's.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.machines import described, machine
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS

WINDOW = 32


def along(positions: int, threads: int) -> None:
    """Print the table for a small MH-MoE."""
    settings = MODEL_PRESETS["small-mh-moe-2"].model_dump()
    settings["max_position_embeddings"] = positions
    parameters = Parameters(ModelConfig.model_validate(settings), np.float32)
    initialise(parameters, seed=0)
    ops = load_operations("numba", threads=threads)
    model = Model.of(parameters.to_device(ops), ops=ops)

    cache = KeyValueCache(model, sequences=1, positions=positions, ops=ops)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, positions)
    token_ms = []
    for token in tokens:
        start = time.perf_counter()
        cache.extend(np.array([[token]]))
        token_ms.append((time.perf_counter() - start) * 1e3)
    blas = ops.blas()
    assert blas is not None
    print(f"{machine()}, {described(blas._asdict())}")
    print("position   token ms")
    for first in [WINDOW, *range(positions // 4, positions + 1, positions // 4)]:
        print(f"{first:8d} {np.median(token_ms[first - WINDOW : first]):10.3f}")
