"""Does a generated token cost more the more was generated before it?

    python -m benchmarks.decode [--positions 2048] [--threads N] [--blas openblas|mkl]

Decodes token by token with the key-value cache and prints the median milliseconds of a token,
and of its attention alone, in windows along the way. Everything but attention should stay level.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.machines import add_blas_option, described, machine, use_blas
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS

WINDOW = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    add_blas_option(parser)
    arguments = parser.parse_args()
    use_blas(arguments.blas)
    settings = MODEL_PRESETS["small-mh-moe-2"].model_dump()
    settings["max_position_embeddings"] = arguments.positions
    parameters = Parameters(ModelConfig.model_validate(settings), np.float32)
    initialise(parameters, seed=0)
    ops = load_operations("numba", threads=arguments.threads)
    model = Model.of(parameters.to_device(ops), ops=ops)

    attention, spent = ops.attention_with_cache, [0.0]

    def timed_attention(*heads: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        result = attention(*heads)
        spent[0] += time.perf_counter() - start
        return result

    ops.attention_with_cache = timed_attention  # type: ignore[method-assign]
    cache = KeyValueCache(model, sequences=1, positions=arguments.positions, ops=ops)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, arguments.positions)
    total_ms, attention_ms = [], []
    for token in tokens:
        spent[0], start = 0.0, time.perf_counter()
        cache.extend(np.array([[token]]))
        total_ms.append((time.perf_counter() - start) * 1e3)
        attention_ms.append(spent[0] * 1e3)
    blas = ops.blas()
    assert blas is not None
    print(f"{machine()}, {described(blas._asdict())}")
    print("position   token ms   attention ms   rest ms")
    for first in [
        WINDOW,
        *range(arguments.positions // 4, arguments.positions + 1, arguments.positions // 4),
    ]:
        window = slice(first - WINDOW, first)
        whole, part = np.median(total_ms[window]), np.median(attention_ms[window])
        print(f"{first:8d} {whole:10.3f} {part:14.3f} {whole - part:9.3f}")


if __name__ == "__main__":
    main()
