"""Our side of a comparison: the trainer's step, and evaluation, on given batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.protocol import OPTIMIZER, SGEMM, Options, read_options, serve
from benchmarks.sizes import benchmark_config
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch, loss
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Blas, Operations
from mhmoe_np.storage.tensors import read_into
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner

SETTINGS = adamw_settings(0, total_steps=1, optimizer=OPTIMIZER)


class NumpySide:
    """See `protocol.Side`."""

    def __init__(self, options: Options, ops: Operations) -> None:
        config = benchmark_config(options.size, options.model)
        self._ops, self._threads = ops, options.threads
        parameters = Parameters(config, np.float32)
        read_into(options.weights, parameters.tensors)
        self._learner: Learner | None = None
        if options.work == "train":
            moments = Moments.zeros(config, np.float32)
            self._learner = Learner(parameters, moments, updates=0, ops=ops)
        self.model = (
            self._learner.model if self._learner else Model.of(parameters.to_device(ops), ops=ops)
        )
        self._tokens = np.load(options.tokens)
        self._calls = 0

    def _next_tokens(self) -> np.ndarray:
        tokens: np.ndarray = self._tokens[self._calls % len(self._tokens)]
        self._calls += 1
        return tokens

    def loss(self) -> tuple[float, float]:
        losses = loss(self.model, [Batch.of(self._tokens[0])], ops=self._ops).losses
        return losses.nll, losses.loss

    def train_step(self) -> None:
        assert self._learner is not None
        self._learner.step([Batch.of(self._next_tokens())], SETTINGS)

    def evaluate_batch(self) -> None:
        tokens = self._next_tokens()
        sequences, window = len(tokens), tokens.shape[1] - 1
        stream = tokens.reshape(-1)[: sequences * window + 1]
        score_stream(self.model, stream, window=window, batch_tokens=sequences * window, ops=self._ops)

    def product(self) -> tuple[Callable[[], object], float]:
        threadpool_limits(self._threads, user_api="blas")
        x, out = np.ones((SGEMM, SGEMM), np.float32), np.empty((SGEMM, SGEMM), np.float32)
        return lambda: np.matmul(x, x, out=out), 2.0 * SGEMM**3

    def blas(self) -> Blas:
        found = self._ops.blas()
        assert found is not None
        return found


def main() -> None:
    options = read_options(__doc__ or "")
    serve(NumpySide(options, load_operations("numba", threads=options.threads, keep_buffers=True)))


if __name__ == "__main__":
    main()
