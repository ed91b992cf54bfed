"""Our side of a comparison: the step of `mhmoe_np.train`, and evaluation, on given batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.protocol import Options, read_options, serve
from benchmarks.sizes import benchmark_config
from mhmoe_np.evaluate import score_stream
from mhmoe_np.model.language_model import Batch, Model, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.step import Learner, Moments
from mhmoe_np.tensors import read_into

SETTINGS = AdamWSettings(6e-4, 0.9, 0.95, 1e-6, 0.1)
CLIP_NORM = 2.0
SGEMM = 2048  # rows and columns of the large product


class NumpySide:
    """See `protocol.Side`. What only training needs is made when it is first asked for."""

    def __init__(self, options: Options, ops: Operations) -> None:
        self.config = benchmark_config(options.size, options.model)
        self.ops, self._threads = ops, options.threads
        self.parameters = Parameters(self.config, np.float32)
        read_into(options.weights, self.parameters.tensors)
        self.model = Model.of(self.parameters, ops=ops)
        self._tokens = np.load(options.tokens)
        self._calls = 0

    @cached_property
    def _learner(self) -> Learner:
        return Learner(self.parameters, Moments.zeros(self.config, np.float32), updates=0, ops=self.ops)

    def _next_tokens(self) -> np.ndarray:
        tokens: np.ndarray = self._tokens[self._calls % len(self._tokens)]
        self._calls += 1
        return tokens

    def loss(self) -> tuple[float, float]:
        gradient = Parameters(self.config, np.float32)
        batch = _batch(self._tokens[0])
        losses, _ = loss_and_gradient(self.model, gradient, [batch], ops=self.ops)
        return losses.nll, losses.loss

    def train_step(self) -> None:
        _, _, norm = self._learner.loss_and_gradient([_batch(self._next_tokens())])
        self._learner.update(norm, SETTINGS, clip_norm=CLIP_NORM)

    def evaluate_batch(self) -> None:
        tokens = self._next_tokens()
        sequences, window = len(tokens), tokens.shape[1] - 1
        stream = tokens.reshape(-1)[: sequences * window + 1]
        score_stream(self.model, stream, window=window, batch_tokens=sequences * window, ops=self.ops)

    def product(self) -> tuple[Callable[[], object], float]:
        threadpool_limits(self._threads, user_api="blas")
        x, out = np.ones((SGEMM, SGEMM), np.float32), np.empty((SGEMM, SGEMM), np.float32)
        return lambda: np.matmul(x, x, out=out), 2.0 * SGEMM**3


def _batch(tokens_BT1: np.ndarray) -> Batch:
    return Batch(np.ascontiguousarray(tokens_BT1[:, :-1]), np.ascontiguousarray(tokens_BT1[:, 1:]))


def main() -> None:
    options = read_options(__doc__ or "")
    serve(NumpySide(options, load_operations("numba", threads=options.threads, keep_buffers=True)))


if __name__ == "__main__":
    main()
