"""A little of everything on the GPU: what the sanitizers watch.

    python -m tests.gpu.small_work KIND MATMUL

Nothing is recorded, and nothing handed out twice, so that each array is memory of its own.
"""

from __future__ import annotations

import sys

import numpy as np

from mhmoe_np.audit.models import parameters
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.settings.run import OptimizerConfig
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner
from tests.cuda.backend import cuda_operations


def main(kind: str, matmul: str) -> None:
    """Two training steps, a score, and decoding."""
    ops = cuda_operations(keep_buffers=False, matmul=matmul)
    initial = parameters(kind, np.float32)
    config = initial.config
    learner = Learner(initial, Moments.zeros(config, np.float32), updates=0, ops=ops)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 12))
    for _ in range(2):
        result = learner.step(
            [Batch.of(tokens)], adamw_settings(0, total_steps=1, optimizer=OptimizerConfig())
        )
        assert result.is_finite
    nll = score_stream(learner.model, tokens.reshape(-1), window=16, batch_tokens=32, ops=ops)
    assert np.isfinite(nll)
    cache = KeyValueCache(learner.model, sequences=3, positions=12, ops=ops)
    for first, last in ((0, 7), (7, 8), (8, 9), (9, 12)):
        with ops.scope():
            assert np.isfinite(ops.to_host(cache.extend(tokens[:, first:last]))).all()


if __name__ == "__main__":
    main(*sys.argv[1:])
