"""The gradient of a whole model's loss against derivatives of that loss, tensor by tensor."""

from __future__ import annotations

import math
from typing import cast

import numpy as np

from mhmoe_np.audit.derivative import GradientCheck, check_gradients
from mhmoe_np.audit.models import parameters
from mhmoe_np.audit.surrogate import ChoiceSwitchedError, Surrogate, acting_weights
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache, Model
from mhmoe_np.model.loss import IGNORED, Batch, loss, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.checked import Checked
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

MODEL_BOUND = 1e-6


def check_model(kind: str, ops: Operations) -> GradientCheck:
    """Every tensor's gradient of the whole loss, each along a direction of its own.

    kind: see `models`.

    The gradient is that of the model on the backend's arrays, every call held to the table's promises;
    the differences repeat the same calls, through `Surrogate`, without.
    """
    at = parameters(kind, np.float64)
    rng = np.random.default_rng(1)
    batch = _batch(at.config, rng)
    around = _Loss(at, batch, ops)
    return check_gradients(
        f"model: {kind}",
        around.value,
        at.tensors,
        _gradient(at, batch, cast(Operations, Checked(ops))).tensors,
        rounding=around.rounding,
        directions=1,
        bound=MODEL_BOUND,
        rng=rng,
    )


def _batch(config: ModelConfig, rng: np.random.Generator) -> Batch:
    """Two sequences, the second padded."""
    tokens = rng.integers(0, config.vocab_size, (2, 8))
    tokens[1, 5:] = IGNORED
    batch = Batch.of(tokens)
    return batch._replace(input_BT=np.maximum(batch.input_BT, 0))


def _gradient(parameters: Parameters, batch: Batch, ops: Operations) -> Parameters:
    on_device = parameters.to_device(ops)
    gradient = on_device.zeros_like(ops=ops)
    loss_and_gradient(Model.of(on_device, ops=ops), gradient, [batch], ops=ops)
    return gradient.to_host(ops)


class _Loss:
    """A model's loss as a function of its tensors, around a point."""

    def __init__(self, at: Parameters, batch: Batch, ops: Operations) -> None:
        self._batch, self._surrogate = batch, Surrogate(ops)
        self._ops = cast(Operations, self._surrogate)
        self._at = at
        self._moved = Parameters(at.config, np.float64, flat_P=at.flat_P.copy())
        self._model = Model.of(self._moved, ops=self._ops)
        self._origin, self._choice = self._loss_and_choice()
        self.rounding = float(np.spacing(self._origin))

    def value(self, tensor: str, moved: FloatArray) -> float:
        """The loss with one tensor moved, less that at the point; NaN: other experts are chosen."""
        self._moved.tensors[tensor][...] = moved
        value, choice = self._loss_and_choice()
        self._moved.tensors[tensor][...] = self._at.tensors[tensor]
        return value - self._origin if choice == self._choice else math.nan

    def _loss_and_choice(self) -> tuple[float, bytes]:
        """Without quantised weights the surrogate is the model."""
        choices: list[bytes] = []

        def note(_: FloatArray, cache: ForwardCache) -> None:
            choices.extend(
                block.feed_forward.routing.expert_MK.tobytes()
                for block in cache.blocks
                if isinstance(block.feed_forward, MoeCache)
            )

        self._surrogate.rewind()
        weights = acting_weights(self._model.weights, self._at, self._moved)
        model = self._model._replace(weights=weights)
        try:
            losses = loss(model, [self._batch], watch=note, ops=self._ops).losses
        except ChoiceSwitchedError:
            return math.nan, b""
        return losses.loss, b"".join(choices)
