"""The loss of a batch, and its gradient: the one path from tokens to numbers.

Training, traces, gradient checks and benchmarks all come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_np.model.language_model import (
    ForwardCache,
    Model,
    backward,
    checked_ids,
    forward,
    known_ids,
)
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import StepResult, StepSums
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray, IntArray

IGNORED = -100  # a target that is not counted


class Batch(NamedTuple):
    """Token ids in, token ids wanted, on the host; a target of -100 is padding."""

    input_BT: IntArray
    target_BT: IntArray

    @classmethod
    def of(cls, windows: IntArray) -> Batch:
        """From windows [B, T+1]: all but the last token go in, all but the first are wanted.

        Shapes   [B, T+1] -> input_BT, target_BT
        """
        return cls(np.ascontiguousarray(windows[:, :-1]), windows[:, 1:])

    def arrays(self, config: ModelConfig) -> DeviceBatch:
        """What a model is given of it, still on the host.

        Shapes   -> id_BT, target_N, counted_M
        Raises   ValueError: a target is neither -100 nor of the vocabulary; see `checked_ids`.
        """
        target_N = np.ascontiguousarray(self.target_BT.reshape(-1), np.int64)
        counted_N = target_N != IGNORED
        known_ids(target_N[counted_N], config)
        counted_M = np.repeat(counted_N, config.moe_heads)
        return DeviceBatch(checked_ids(self.input_BT, config), target_N, counted_M)


class DeviceBatch(NamedTuple):
    """A batch as a model is given it: the backend's arrays."""

    id_BT: IntArray
    target_N: IntArray
    counted_M: BoolArray  # which sub-tokens the router's statistics count

    @classmethod
    def of(cls, batch: Batch, config: ModelConfig, *, ops: Operations) -> DeviceBatch:
        """Taken to the device.

        Shapes   -> id_BT, target_N, counted_M
        Raises   ValueError: see `checked_ids`.
        """
        return cls(*map(ops.to_device, batch.arrays(config)))


Watch = Callable[[FloatArray, ForwardCache], None]
"""Is shown each micro-batch's final norm's output [N, D] and cache, before their memory goes back."""


def targets_of(micro_batches: Sequence[Batch]) -> int:
    """How many targets count.

    Shapes   micro_batches
    Raises   ValueError: none does.
    Source   [spec 4 not counted]
    """
    targets = sum(int(np.count_nonzero(batch.target_BT != IGNORED)) for batch in micro_batches)
    if targets == 0:
        raise ValueError("the batch has no target to count: every one is -100")
    return targets


def loss(
    model: Model, micro_batches: Sequence[Batch], *, watch: Watch | None = None, ops: Operations
) -> StepResult:
    """The losses and router statistics of a batch by forward passes alone.

    Shapes   micro_batches
    Raises   ValueError: no target is counted, or see `checked_ids`.
    Source   [spec 4 NLL]
    """
    targets, sums = targets_of(micro_batches), StepSums(model.config, ops=ops)
    for micro_batch in micro_batches:
        with ops.scope():
            batch = DeviceBatch.of(micro_batch, model.config, ops=ops)
            tallies = sums.tallies(batch.counted_M)
            y_ND, cache = forward(model, batch.id_BT, tallies, drop=True, ops=ops)
            if watch is not None:
                watch(y_ND, cache)
            nll_N = ops.token_nll(y_ND, model.weights.output_VD, batch.target_N)
            ops.add_sum(nll_N, sums.nll_1)
    return sums.read(targets, model.weights.dtype)


def add_router_statistics(
    model: Model, micro_batches: Sequence[DeviceBatch], sums: StepSums, *, ops: Operations
) -> None:
    """Add each MoE layer's router statistics to `sums`, by forward passes alone.

    Shapes   micro_batches
    Source   [D5]
    """
    for batch in micro_batches:
        with ops.scope():
            forward(model, batch.id_BT, sums.tallies(batch.counted_M), drop=True, ops=ops)


def add_loss_and_gradient(
    model: Model,
    gradient: Parameters,
    micro_batches: Sequence[DeviceBatch],
    sums: StepSums,
    *,
    targets: int,
    watch: Watch | None = None,
    ops: Operations,
) -> None:
    """Add the loss of one batch that comes in micro-batches to `sums`, its gradient to `gradient`.

    The result is that of the big batch: the mean is over all its targets, and the balance loss uses
    the experts' shares in all of it. Those shares are known only after every micro-batch was routed,
    so with more than one micro-batch a forward pass over all of them comes first [D5].

    targets: how many of the batch count (`targets_of`).
    Nothing is read back: `sums` says what came of it once it is read.

    Shapes   micro_batches
    Source   [spec 4 NLL], [D5]
    """
    routed = len(micro_batches) > 1 and model.config.num_experts > 0
    if routed:
        add_router_statistics(model, micro_batches, sums, ops=ops)
    for batch in micro_batches:
        with ops.scope():
            tallies = sums.tallies(batch.counted_M, known=routed)
            y_ND, cache = forward(model, batch.id_BT, tallies, drop=True, ops=ops)
            if watch is not None:
                watch(y_ND, cache)
            nll_N, dy_ND = ops.token_nll_and_gradient(
                y_ND,
                model.weights.output_VD,
                batch.target_N,
                gradient.output_VD,
                dnll=1 / targets,
            )
            ops.add_sum(nll_N, sums.nll_1)
            backward(dy_ND, cache, sums.losses_backward(targets), model, gradient, ops=ops)


def loss_and_gradient(
    model: Model,
    gradient: Parameters,
    micro_batches: Sequence[Batch],
    *,
    watch: Watch | None = None,
    ops: Operations,
) -> StepResult:
    """`add_loss_and_gradient` of the host's batch, and its sums, read.

    Shapes   micro_batches
    Raises   ValueError: no target is counted, or see `checked_ids`.
    Source   [spec 4 loss], [D5]
    """
    targets, sums = targets_of(micro_batches), StepSums(model.config, ops=ops)
    batches = [DeviceBatch.of(batch, model.config, ops=ops) for batch in micro_batches]
    add_loss_and_gradient(model, gradient, batches, sums, targets=targets, watch=watch, ops=ops)
    return sums.read(targets, model.weights.dtype)
