"""One step of training: the loss and its gradient, then AdamW's update. No files, no schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch, DeviceBatch, Watch, add_loss_and_gradient, targets_of
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import StepResult, StepSums
from mhmoe_np.model.weights import requantise
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.types import FloatArray


class Learner:
    """A model that learns: its parameters, their gradient and AdamW's moments, all on the device.

    A step is `add_gradient`, `update`, `read`, in this order; only the last one waits for the device.
    `step` does all three, as work that the backend may record and repeat.

    Attributes:
        parameters: in float, as they stand.
        model: what computes with them; quantised again after each update.
        gradient: of the last `add_gradient`; zero after an update.
        moments: AdamW's.
        updates: made so far.
    """

    def __init__(
        self, parameters: Parameters, moments: Moments, *, updates: int, ops: Operations
    ) -> None:
        """Go on from the host's parameters and moments; where the host is the device, in place."""
        self.updates, self._ops = updates, ops
        self.parameters = parameters.to_device(ops)
        self.moments = moments.to_device(ops)
        self.gradient = self.parameters.zeros_like(ops=ops)
        self.model = Model.of(self.parameters, ops=ops)
        self._sums = StepSums(parameters.config, ops=ops)
        self._targets = 0
        self._repeated = ops.repeated(self._gradient_and_update)

    def add_gradient(self, micro_batches: Sequence[Batch], watch: Watch | None = None) -> None:
        """Begin a step: the batch's loss, its gradient and that gradient's norm.

        Raises ValueError: see `add_loss_and_gradient`.
        """
        self._targets = targets_of(micro_batches)
        config = self.parameters.config
        batches = [DeviceBatch.of(batch, config, ops=self._ops) for batch in micro_batches]
        self._add_gradient(batches, self._targets, watch)

    def _add_gradient(
        self, micro_batches: Sequence[DeviceBatch], targets: int, watch: Watch | None = None
    ) -> None:
        self._sums.clear()
        add_loss_and_gradient(
            self.model,
            self.gradient,
            micro_batches,
            self._sums,
            targets=targets,
            watch=watch,
            ops=self._ops,
        )
        self._ops.add_sum_of_squares(self.gradient.flat_P, self._sums.squares_1)

    def update(self, settings: AdamWSettings) -> None:
        """AdamW with the clipped gradient, and the weights quantised again.

        Where a loss or the gradient is not finite all stays as it is, the gradient too. Where only the
        update of single parameters would not be finite these stay as they are (`StepResult.left_out`).
        """
        self._update(self._ops.to_device(settings.update(self.updates + 1)))

    def _update(self, update_8: FloatArray) -> None:
        self._ops.adamw_in_place(
            self.parameters.flat_P,
            self.gradient.flat_P,
            self.moments.first.flat_P,
            self.moments.second.flat_P,
            self._sums.squares_1,
            self._sums.guard,
            self._sums.left_out_1,
            update_8,
        )
        requantise(self.model.weights, self.parameters, self._sums.report_X5, ops=self._ops)

    def read(self) -> StepResult:
        """Wait for the step; an update that was made counts from here on."""
        result = self._sums.read(self._targets, self.parameters.flat_P.dtype)
        self.updates += result.is_finite
        return result

    def step(
        self, micro_batches: Sequence[Batch], settings: AdamWSettings, watch: Watch | None = None
    ) -> StepResult:
        """A whole step, with the same bits whether it is watched or not.

        Raises ValueError: see `add_loss_and_gradient`.
        """
        if watch is not None:  # what was recorded and is repeated calls nobody
            self.add_gradient(micro_batches, watch)
            self.update(settings)
            return self.read()
        self._targets = targets_of(micro_batches)
        batches = [batch.arrays(self.parameters.config) for batch in micro_batches]
        self._repeated(
            self._targets,
            settings.update(self.updates + 1),
            *(array for batch in batches for array in batch),
        )
        return self.read()

    def _gradient_and_update(self, targets: int, update_8: FloatArray, *arrays: Any) -> None:
        """arrays: those of each micro-batch's `DeviceBatch`, one after another."""
        fields = len(DeviceBatch._fields)
        starts = range(0, len(arrays), fields)
        self._add_gradient([DeviceBatch(*arrays[i : i + fields]) for i in starts], targets)
        self._update(update_8)
