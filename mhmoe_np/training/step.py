"""One step of training: the loss and its gradient, then AdamW's update. No files, no schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mhmoe_np.layers.balance import RouterStatistics
from mhmoe_np.model.language_model import Batch, Losses, Model, loss_and_gradient
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import MatrixCounts, requantise
from mhmoe_np.operations.table import AdamWSettings, Operations


class Learner:
    """A model that learns: its parameters, their gradient and AdamW's moments.

    Attributes:
        parameters: in float, as they stand.
        model: what computes with them; quantised again after each update.
        gradient: of the last `loss_and_gradient`; zero after an update.
        moments: AdamW's.
        updates: made so far.
    """

    def __init__(
        self, parameters: Parameters, moments: Moments, *, updates: int, ops: Operations
    ) -> None:
        """Go on from these; the updates change them in place."""
        self.parameters, self.moments, self.updates, self._ops = parameters, moments, updates, ops
        self.gradient = Parameters(parameters.config, parameters.flat_P.dtype)
        self.model = Model.of(parameters, ops=ops)

    def loss_and_gradient(
        self, micro_batches: Sequence[Batch]
    ) -> tuple[Losses, list[RouterStatistics], float]:
        """The loss, each MoE layer's router statistics and the gradient's norm (see the function)."""
        losses, statistics = loss_and_gradient(self.model, self.gradient, micro_batches, ops=self._ops)
        return losses, statistics, math.sqrt(self._ops.sum_of_squares(self.gradient.flat_P))

    def update(
        self, norm: float, settings: AdamWSettings, *, clip_norm: float
    ) -> dict[str, MatrixCounts]:
        """AdamW with the gradient of norm `norm` clipped to `clip_norm`; the quantised matrices."""
        self._ops.adamw_in_place(
            self.parameters.flat_P,
            self.gradient.flat_P,
            self.moments.first.flat_P,
            self.moments.second.flat_P,
            step=self.updates + 1,
            gradient_scale=min(1.0, clip_norm / max(norm, 1e-30)),
            settings=settings,
        )
        self.updates += 1
        return requantise(self.model.weights, self.parameters, ops=self._ops)
