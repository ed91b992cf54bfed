"""Our side of a comparison: the trainer's step, and evaluation, on given batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.protocol import Options, read_options, serve
from benchmarks.sizes import benchmark_config
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.language_model import Batch, Model, forward, losses_of
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.storage.tensors import read_into
from mhmoe_np.training.step import Learner

SETTINGS = AdamWSettings(6e-4, 0.9, 0.95, 1e-6, 0.1)
CLIP_NORM = 2.0
SGEMM = 2048  # rows and columns of the large product


class NumpySide:
    """See `protocol.Side`."""

    def __init__(self, options: Options, ops: Operations) -> None:
        self._config = benchmark_config(options.size, options.model)
        self._ops, self._threads = ops, options.threads
        parameters = Parameters(self._config, np.float32)
        read_into(options.weights, parameters.tensors)
        self._learner: Learner | None = None
        if options.work == "train":
            moments = Moments.zeros(self._config, np.float32)
            self._learner = Learner(parameters, moments, updates=0, ops=ops)
        self.model = self._learner.model if self._learner else Model.of(parameters, ops=ops)
        self._tokens = np.load(options.tokens)
        self._calls = 0

    def _next_tokens(self) -> np.ndarray:
        tokens: np.ndarray = self._tokens[self._calls % len(self._tokens)]
        self._calls += 1
        return tokens

    def loss(self) -> tuple[float, float]:
        batch = Batch.of(self._tokens[0])
        target_N = batch.target_BT.reshape(-1)
        with self._ops.scope():
            x_ND, statistics, _ = forward(
                self.model, batch.input_BT, target_N >= 0, drop=True, ops=self._ops
            )
            nll_N = self._ops.token_nll(x_ND, self.model.weights.output_VD, target_N)
            nll = float(nll_N.sum(dtype=np.float64))
        losses = losses_of(nll, len(target_N), statistics, self._config)
        return losses.nll, losses.loss

    def train_step(self) -> None:
        assert self._learner is not None
        _, _, norm = self._learner.loss_and_gradient([Batch.of(self._next_tokens())])
        self._learner.update(norm, SETTINGS, clip_norm=CLIP_NORM)

    def evaluate_batch(self) -> None:
        tokens = self._next_tokens()
        sequences, window = len(tokens), tokens.shape[1] - 1
        stream = tokens.reshape(-1)[: sequences * window + 1]
        score_stream(self.model, stream, window=window, batch_tokens=sequences * window, ops=self._ops)

    def product(self) -> tuple[Callable[[], object], float]:
        threadpool_limits(self._threads, user_api="blas")
        x, out = np.ones((SGEMM, SGEMM), np.float32), np.empty((SGEMM, SGEMM), np.float32)
        return lambda: np.matmul(x, x, out=out), 2.0 * SGEMM**3


def main() -> None:
    options = read_options(__doc__ or "")
    serve(NumpySide(options, load_operations("numba", threads=options.threads, keep_buffers=True)))


if __name__ == "__main__":
    main()
