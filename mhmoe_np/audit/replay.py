"""Repeating the step that ended a run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.audit.first_fault import Repetition, repeat_step
from mhmoe_np.audit.not_finite import TensorFault, state_faults
from mhmoe_np.checkpoints.failure import Failure
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch
from mhmoe_np.operations.table import Operations


class Replay(NamedTuple):
    """What was found."""

    state: list[TensorFault]  # the first tensor of the weights and of each moment that is not finite
    step: Repetition

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fault, result, hidden = self.step
        return {
            "state": [tensor.as_dict() | {"sentence": str(tensor)} for tensor in self.state],
            "fault": None if fault is None else fault.as_dict() | {"sentence": str(fault)},
            "losses": None if result is None else result.losses._asdict(),
            "gradient_norm": None if result is None else result.gradient_norm,
            "largest_hidden_state": hidden,
        }


def replay(failure: Failure, *, ops: Operations) -> Replay:
    """Look through the state, then repeat the step's forward and backward under observation."""
    state = state_faults(failure.parameters, failure.moments)
    parameters = failure.parameters.to_device(ops)
    # What is not finite in the weights is reported already: their quantisers need not warn of it.
    with np.errstate(all="ignore"):
        model = Model.of(parameters, ops=ops)
    micro_batches = [Batch.of(windows) for windows in failure.windows]
    return Replay(state, repeat_step(model, parameters.zeros_like(ops=ops), micro_batches, ops=ops))
