"""Where a step that came to numbers that are not finite has them from: layer, operation, tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mhmoe_np.audit.first_fault import first_fault
from mhmoe_np.audit.not_finite import state_faults, weights_fault
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import StepResult
from mhmoe_np.operations.table import Operations
from mhmoe_np.training.step import Learner


def diagnose(
    learner: Learner, result: StepResult, micro_batches: Sequence[Batch], *, ops: Operations
) -> str:
    """What was not finite first: in the state, else in the gradient, else in the step, repeated.

    result: what the learner's last step came to, which was not finite. The gradient is 0 afterwards.
    """
    try:
        return _diagnosed(learner, result, micro_batches, ops)
    finally:
        learner.gradient.flat_P[...] = 0


def _diagnosed(
    learner: Learner, result: StepResult, micro_batches: Sequence[Batch], ops: Operations
) -> str:
    found = state_faults(learner.parameters.to_host(ops), learner.moments.to_host(ops))
    if found:
        return str(found[0])
    gradient = learner.gradient.to_host(ops)
    spoilt = weights_fault(gradient, "gradient of")
    if result.left_out:
        return str(spoilt) if spoilt is not None else _update_left_out(gradient, result.left_out)
    fault = first_fault(learner.model, learner.gradient, micro_batches, ops=ops)
    if fault is not None:
        return str(fault)
    return (
        f"{_first_seen(learner, result)}{f' and {spoilt}' if spoilt else ''}, but the step is finite "
        "when it is repeated: the memory or the processor may be at fault"
    )


def _update_left_out(gradient: Parameters, parameters: int) -> str:
    """Where an update would have overflowed: its gradient is still there, all others are 0."""
    names = (name for name, tensor in gradient.tensors.items() if np.any(tensor))
    return f"AdamW's update of {next(names, 'a tensor')} ({parameters} parameters left as they were)"


def _first_seen(learner: Learner, result: StepResult) -> str:
    """The first router or quantised matrix whose sums are not finite, else the loss."""
    config = learner.model.config
    layers = filter(config.is_moe_layer, range(config.num_hidden_layers))
    for layer, router in zip(layers, result.statistics, strict=True):
        if not (np.isfinite(router.p_sum_E).all() and math.isfinite(router.squared_log_sum_exp)):
            return f"layer {layer}, the router's logits"
    for name, matrix in result.matrices.items():
        if not math.isfinite(matrix.scale):
            return f"the scale of {name}"
    return "a count of experts or weights" if math.isfinite(result.losses.loss) else "the loss"
