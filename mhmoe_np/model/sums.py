"""The sums of a training step: everything that the host learns of it, in one buffer, read at once.

This read is the one point of a step at which the host waits for the device. Before it the gradients,
the clipping, the update and the next quantisation are under way already: none of them needs a number on
the host, and the update guards itself against numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mhmoe_np.layers.balance import (
    RouterStatistics,
    Tally,
    balance_loss,
    router_losses,
    z_loss,
)
from mhmoe_np.model.parameters import parameter_table
from mhmoe_np.model.weights import MatrixCounts
from mhmoe_np.operations.table import Operations, RouterLosses, RouterSums
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray


class Losses(NamedTuple):
    """The loss and its parts, in nats; aux and z are sums over layers without their coefficients."""

    loss: float
    nll: float
    aux_loss: float
    z_loss: float


class StepResult(NamedTuple):
    """What a training step came to."""

    losses: Losses
    statistics: list[RouterStatistics]  # of each MoE layer
    gradient_norm: float  # before clipping
    matrices: dict[str, MatrixCounts]  # of each quantised tensor, after the update
    left_out: int  # parameters whose update would not have been finite
    finite_sums: bool  # all of them; where one is not, a count may be 0 in its place

    @property
    def is_finite(self) -> bool:
        """Whether the update was made, for every parameter.

        Where a sum is not finite it is left out altogether; else those it left out are counted.
        """
        return self.finite_sums and not self.left_out


class _Views(NamedTuple):
    """What stands where in the buffer."""

    nll_1: Any
    squares_1: Any
    router: list[RouterSums]
    guard: Any  # all of the above
    left_out_1: Any
    report_X5: Any

    @classmethod
    def of(cls, flat: Any, config: ModelConfig, matrices: int) -> _Views:
        """Views of one array of `length` numbers."""
        E, router, first = config.num_experts, [], 2
        for _ in range(config.moe_layers):
            chosen_first, chosen, p, dropped = (flat[first + i * E :][:E] for i in range(4))
            first += 4 * E + 1
            router.append(RouterSums(chosen_first, chosen, p, dropped, flat[first - 1 : first]))
        left_out_1, report = flat[first : first + 1], flat[first + 1 :]
        return cls(flat[:1], flat[1:2], router, flat[:first], left_out_1, report.reshape(matrices, 5))


class StepSums:
    """Sums on the device that add up over the micro-batches of a step.

    Attributes:
        nll_1: total NLL of the counted targets.
        squares_1: of the whole gradient.
        router: of each MoE layer.
        guard: all of these, for `Operations.adamw_in_place`.
        left_out_1: how many parameters that left as they were.
        report_X5: what `requantise` says of each quantised matrix, in the parameter table's order.
    """

    def __init__(self, config: ModelConfig, *, ops: Operations) -> None:
        """Room for the sums of this model, all 0."""
        self._config, self._ops = config, ops
        self._names = [
            part.tensor for entry in parameter_table(config) if entry.quantised for part in entry.parts
        ]
        length = 3 + config.moe_layers * (4 * config.num_experts + 1) + 5 * len(self._names)
        self._flat = ops.zeros((length,), np.float64)
        views = _Views.of(self._flat, config, len(self._names))
        self.nll_1, self.squares_1, self.router, self.guard, self.left_out_1, self.report_X5 = views

    def clear(self) -> None:
        """Start the next step."""
        self._flat[...] = 0

    def tallies(self, counted_M: BoolArray, *, known: bool = False) -> list[Tally | None]:
        """For each layer what its router counts and where; None for a dense one.

        known: the sums are complete already and are not added to again.

        Shapes   counted_M
        """
        config = self._config
        tallies: list[Tally | None] = [None] * config.num_hidden_layers
        moe_layers = filter(config.is_moe_layer, range(config.num_hidden_layers))
        for layer, sums in zip(moe_layers, self.router, strict=True):
            tallies[layer] = Tally(counted_M, None if known else sums)
        return tallies

    def losses_backward(self, targets: int) -> list[RouterLosses | None]:
        """What the loss sends into each layer's router beside the task's gradient; None: dense."""
        config = self._config
        losses: list[RouterLosses | None] = [None] * config.num_hidden_layers
        moe_layers = filter(config.is_moe_layer, range(config.num_hidden_layers))
        for layer, sums in zip(moe_layers, self.router, strict=True):
            losses[layer] = router_losses(sums, targets * config.moe_heads, config)
        return losses

    def read(self, targets: int, dtype: DTypeLike) -> StepResult:
        """Wait for the step and read all its sums; targets: how many the batch has.

        dtype: the model's, in which the probabilities were added up.
        """
        config = self._config
        flat: NDArray[np.float64] = self._ops.to_host(self._flat)
        finite = bool(np.isfinite(flat).all())
        sums = _Views.of(flat, config, len(self._names))
        statistics = [
            RouterStatistics.of(layer, targets * config.moe_heads, dtype) for layer in sums.router
        ]
        losses = losses_of(float(sums.nll_1[0]), targets, statistics, config)
        squares = float(sums.squares_1[0])
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        matrices = {
            name: MatrixCounts(scale, *map(int, np.where(np.isfinite(counts), counts, 0)))
            for name, (scale, *counts) in zip(self._names, sums.report_X5.tolist(), strict=True)
        }
        finite = finite and math.isfinite(losses.loss + norm)
        return StepResult(losses, statistics, norm, matrices, int(sums.left_out_1[0]), finite)


def losses_of(
    nll_sum: float, targets: int, statistics: Sequence[RouterStatistics], config: ModelConfig
) -> Losses:
    """loss = mean NLL + aux_coef * sum of layers' aux + z_coef * sum of layers' z.

    Shapes   statistics
    Source   [spec 4 loss], [P2 eq. 11]
    """
    nll = nll_sum / targets
    aux = sum(balance_loss(layer, config) for layer in statistics)
    z = sum(z_loss(layer) for layer in statistics)
    # P2 eq. 11: L = L_task + alpha L_balance
    total = nll + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z
    return Losses(total, nll, aux, z)
