"""Our side of `benchmarks.decode`: the key-value cache as `generate` uses it, the likeliest token next.

`--head` is `--head-dtype` of `generate`. `tokens N` -> N tokens after a prompt.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.decode_protocol import PROMPT, log_probability, read_options, serve
from mhmoe_np.checkpoints.checkpoint import load_model
from mhmoe_np.inference.generate import Head, head_of
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.head import ExactHead
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations

READ_BYTES = 1 << 29


class OurSide:
    """See `decode_protocol.Side`."""

    def __init__(self, model: Model, head: Head | None, ops: Operations) -> None:
        self._model, self._ops = model, ops
        self._exact = head if isinstance(head, ExactHead) else None
        self._head = head.weight if isinstance(head, ExactHead) else head

    def _cache(self, sequences: int, positions: int) -> KeyValueCache:
        return KeyValueCache(
            self._model, sequences=sequences, positions=positions, head=self._head, ops=self._ops
        )

    def _next(self, cache: KeyValueCache, ids: np.ndarray) -> np.ndarray:
        with self._ops.scope():
            logits_BV = self._ops.to_host(cache.extend(ids))
            if self._exact is None:
                return logits_BV.argmax(axis=1)[:, None]
            assert cache.last_BD is not None
            settled = [
                self._exact.logits(cache.last_BD, row, score_V, 1)
                for row, score_V in enumerate(logits_BV)
            ]
            return np.array([[logits_V.argmax()] for logits_V in settled])

    def tokens(self, prompt: np.ndarray, count: int) -> list[float]:
        cache, ids, made = self._cache(1, prompt.shape[1] + count), prompt, []
        for _ in range(count):
            ids = self._next(cache, ids)
            made.append(float(ids[0, 0]))
        return made

    def score(self, ids: np.ndarray) -> list[float]:
        cache, found = self._cache(len(ids), ids.shape[1]), []
        for first, last in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, ids.shape[1] - 1))]:
            with self._ops.scope():
                logits = self._ops.to_host(cache.extend(ids[:, first:last]))
                found.append(log_probability(logits[0], ids[0, last]))
        return found

    def decode(self, prompt: np.ndarray, tokens: int) -> float:
        cache = self._cache(len(prompt), prompt.shape[1] + tokens)
        ids = self._next(cache, prompt)
        start = time.perf_counter()
        for _ in range(tokens):
            ids = self._next(cache, ids)
        return time.perf_counter() - start

    def prefill(self, prompt: np.ndarray) -> float:
        start = time.perf_counter()
        self._next(self._cache(len(prompt), prompt.shape[1] + 1), prompt)
        return time.perf_counter() - start


def bandwidth(threads: int, repeats: int) -> float:
    """Bytes a second of reading: an inner product of each thread's share of an array with itself."""
    parts = np.split(np.ones(READ_BYTES // 4, np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def main() -> None:
    options = read_options(__doc__ or "")
    ops = load_operations("numba", threads=options.threads, keep_buffers=True)
    model = load_model(options.model, np.float32, ops=ops)
    head = head_of(model, options.head, Sampling(temperature=0), ops=ops)
    serve(OurSide(model, head, ops), model.config.vocab_size)


if __name__ == "__main__":
    main()
