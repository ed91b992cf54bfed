"""How a step's routers shared out the work: what tells a healthy router from a collapsed one.

How evenly each layer's experts were chosen comes from sums that the step makes anyway. What each head
chose, with which weights, and how far the logits reach, is looked at in what the forward keeps, by
`RouterWatch`, which reads and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_np.layers.balance import RouterStatistics
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.types import FloatArray, IntArray

COLLAPSED = 0.1
"""Of the experts that a router could do without, the share below which it counts as collapsed.

With K experts for each sub-token it uses at least K, and E where it is balanced. One that uses fewer
than K + a tenth of the other E - K has as good as one way left for all tokens; routers that only are
uneven use several times as many.
"""
COLLAPSED_STEPS = 10
"""Steps in a row after which a collapse is told: while the rate rises routers dip there, and return."""
SATURATED = 0.99
"""Mean probability of the first choice from which on a router counts as saturated.

The gradient of a softmax is p (1 - p): above 0.99 it is less than a twenty-fifth of what it is at 1/2,
so the router hardly learns any more, and every other expert's gate is next to nothing.
"""

WarningName = Literal["router-collapse", "router-saturation"]


class LayerBalance(NamedTuple):
    """How evenly one layer's experts were chosen in a step."""

    layer: int  # of the model's, from 0
    entropy: float  # of the experts' shares of choices, over log E: 1 when balanced
    max_over_mean: float  # choices of the busiest expert: 1 when balanced
    dead: int  # experts that nobody chose
    dropped: int  # choices beyond capacity

    @classmethod
    def of(cls, layer: int, statistics: RouterStatistics) -> LayerBalance:
        """From the sums of a step."""
        choice_E = statistics.choice_E
        return cls(
            layer=layer,
            entropy=round(_entropy(choice_E), 6),
            max_over_mean=round(float(choice_E.max() * len(choice_E) / max(1, choice_E.sum())), 6),
            dead=int(np.count_nonzero(choice_E == 0)),
            dropped=statistics.dropped,
        )


class LayerRouting(NamedTuple):
    """What one layer's router did in a step, expert by expert and head by head."""

    layer: int  # of the model's, from 0
    choice_HE: IntArray  # how often each head's sub-tokens chose e, before any is dropped
    gate_HE: FloatArray  # the weights of these choices, added up in float64
    logit_min: float
    logit_max: float
    top_probability: float  # of the first choice; the mean

    def as_dict(self) -> dict[str, Any]:
        """As a line of `router.jsonl` has it; a logit that is not finite is null."""
        return {
            "layer": self.layer,
            "load": self.choice_HE.tolist(),
            "gate_mass": [[_short(gate) for gate in gate_E] for gate_E in self.gate_HE],
            "logit_min": _short(self.logit_min),
            "logit_max": _short(self.logit_max),
            "top_probability": _short(self.top_probability),
        }


class RouterWarning(NamedTuple):
    """A router that has stopped doing its work."""

    name: WarningName
    layer: int
    text: str  # one line, with the remedy


class RouterWatch:
    """Adds up, over a step's micro-batches, what each layer's router did for the counted sub-tokens."""

    def __init__(self, config: ModelConfig, *, ops: Operations) -> None:
        self._config, self._ops = config, ops
        self._seen: dict[int, list[LayerRouting]] = {}
        self._counted: list[int] = []

    def __call__(self, _y_ND: FloatArray, cache: ForwardCache) -> None:
        """Look at one micro-batch's forward.

        Shapes   cache
        """
        for layer, block in enumerate(cache.blocks):
            if isinstance(block.feed_forward, MoeCache):
                self._seen.setdefault(layer, []).append(self._look_at(layer, block.feed_forward))

    def _look_at(self, layer: int, cache: MoeCache) -> LayerRouting:
        H, E, to_host = self._config.moe_heads, self._config.num_experts, self._ops.to_host
        assert cache.counted_M is not None
        counted_M = to_host(cache.counted_M)
        expert_MK = to_host(cache.routing.expert_MK)[counted_M]
        gate_MK = to_host(cache.routing.gate_MK)[counted_M]
        logits_ME = to_host(cache.logits_ME)[counted_M]
        head_M = (np.arange(len(counted_M)) % H)[counted_M]  # sub-token n*H + j is head j's
        choice_HE, gate_HE = np.zeros((H, E), np.int64), np.zeros((H, E))
        np.add.at(choice_HE, (head_M[:, None], expert_MK), 1)
        np.add.at(gate_HE, (head_M[:, None], expert_MK), gate_MK)
        p_ME = to_host(cache.routing.p_ME)[counted_M]
        first_M = np.take_along_axis(p_ME, expert_MK[:, :1], axis=1)[:, 0]
        return LayerRouting(
            layer,
            choice_HE,
            gate_HE,
            # A micro-batch may be padding alone.
            float(logits_ME.min(initial=np.inf)),
            float(logits_ME.max(initial=-np.inf)),
            float(first_M.sum(dtype=np.float64) / max(1, len(first_M))),
        )

    def layers(self) -> list[LayerRouting]:
        """Of all micro-batches together, in the model's order."""
        return [_together(parts) for _, parts in sorted(self._seen.items())]


def _together(parts: Sequence[LayerRouting]) -> LayerRouting:
    """The sums of several micro-batches; means are weighted by their sub-tokens."""
    size = [int(part.choice_HE.sum()) for part in parts]
    return LayerRouting(
        parts[0].layer,
        np.sum([part.choice_HE for part in parts], axis=0),
        np.sum([part.gate_HE for part in parts], axis=0),
        min(part.logit_min for part in parts),
        max(part.logit_max for part in parts),
        sum(n * part.top_probability for n, part in zip(size, parts, strict=True)) / max(1, sum(size)),
    )


class RouterAlarm:
    """Raises each layer's warnings once, as long as one process trains."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._collapsed: dict[int, int] = {}  # layer -> steps in a row
        self._raised: set[tuple[WarningName, int]] = set()

    def look(
        self, balances: Sequence[LayerBalance], routings: Sequence[LayerRouting], choices: int
    ) -> list[RouterWarning]:
        """What is wrong since this step, a line for each router.

        choices: of each layer, in the step. Of fewer choices than experts nothing can be said.
        """
        found = [self.collapse(each.layer, each.entropy, choices) for each in balances]
        found += [self.saturation(each.layer, each.top_probability) for each in routings]
        return [warning for warning in found if warning is not None]

    def collapse(self, layer: int, entropy: float, choices: int) -> RouterWarning | None:
        """That a layer's router has collapsed, if it has since this step.

        entropy: see `LayerBalance`; choices: of the layer, in the step.
        """
        E, K = self._config.num_experts, self._config.num_experts_per_tok
        used = E**entropy
        collapsed = E > K and choices >= E and used < K + COLLAPSED * (E - K)
        self._collapsed[layer] = collapsed * (self._collapsed.get(layer, 0) + 1)
        if self._collapsed[layer] != COLLAPSED_STEPS:
            return None
        return self._raise(
            "router-collapse",
            layer,
            f"layer {layer}: the router has collapsed: it uses about {used:.1f} of {E} experts; raise "
            "router_aux_loss_coef or lower learning_rate",
        )

    def saturation(self, layer: int, top_probability: float) -> RouterWarning | None:
        """That a layer's router is saturated, if that is new.

        top_probability: see `LayerRouting`.
        """
        if self._config.num_experts < 2 or top_probability <= SATURATED:
            return None
        return self._raise(
            "router-saturation",
            layer,
            f"layer {layer}: the router is saturated: its first choice has a probability of "
            f"{top_probability:.4f} on average, so it hardly learns; raise router_z_loss_coef or lower "
            "learning_rate",
        )

    def _raise(self, name: WarningName, layer: int, text: str) -> RouterWarning | None:
        if (name, layer) in self._raised:
            return None
        self._raised.add((name, layer))
        return RouterWarning(name, layer, text)


def choices_of_a_step(config: RunConfig) -> int:
    """How many choices of an expert each layer's router makes in a step."""
    tokens = config.training.batch_size * config.training.sequence_length
    return tokens * config.model.moe_heads * config.model.num_experts_per_tok


def _entropy(count_E: IntArray) -> float:
    """Of the shares, over the most that there can be; 1 where there is one expert, or nothing."""
    share_E = count_E[count_E > 0] / max(1, count_E.sum())
    if len(count_E) < 2 or not len(share_E):
        return 1.0
    # Not -0.0, for one share of 1.
    return abs(float(np.sum(share_E * np.log(share_E)))) / math.log(len(count_E))


def _short(value: float) -> float | None:
    """Six digits: what is shown of it has fewer, and a log grows with every step."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
