"""Router statistics, the balance loss and the z-loss of one MoE layer.

The losses are sums over a batch that may come in several micro-batches: each adds its statistics to the
same `RouterSums`, and the losses are formed from the totals. Their gradients enter the router in
`Operations.route_backward`, which is given what `router_losses` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.table import RouterLosses, RouterSums
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray, IntArray


class Tally(NamedTuple):
    """Which sub-tokens one layer's router statistics count, and where they are added up."""

    counted_M: BoolArray
    sums: RouterSums | None  # None: they are known already


class RouterStatistics(NamedTuple):
    """The sums over the counted sub-tokens (those of padded positions are left out), on the host."""

    sub_tokens: int
    first_choice_E: IntArray  # how many chose e first
    choice_E: IntArray  # how many chose e at all, before any is dropped
    p_sum_E: FloatArray
    squared_log_sum_exp: float
    dropped: int  # choices of counted sub-tokens beyond an expert's capacity

    @classmethod
    def of(cls, sums: RouterSums, sub_tokens: int, dtype: DTypeLike) -> RouterStatistics:
        """From the sums of a model of `dtype`, once they are on the host.

        Shapes   sums
        """
        return cls(
            sub_tokens,
            _counts_of(sums.first_choice_E),
            _counts_of(sums.choice_E),
            sums.p_E.astype(dtype),
            float(sums.squared_log_sum_exp_1[0]),
            int(_counts_of(sums.dropped_E).sum()),
        )


def _counts_of(number_E: FloatArray) -> IntArray:
    """Counts that were added up as floats; 0 where one is not finite, which the step's sums tell."""
    return np.where(np.isfinite(number_E), number_E, 0).astype(np.int64)


def balance_loss(statistics: RouterStatistics, config: ModelConfig) -> float:
    r"""aux = E * sum_e f_e * mean_s p[s, e]: 1 when balanced.

    f_e is the share of first choices (top1) or of all choices (topk) that went to e.

    Equation \mathrm{aux} = E \sum_e f_e\, P_e \\
             f_e = \frac{\mathrm{count}_e}{\sum_{e'} \mathrm{count}_{e'}} \\
             P_e = \frac{1}{n_c} \sum_m p_{me}
    Shapes   statistics
    Source   [spec 4 aux], [Switch eq. 4-6], [P2 eq. 10]; first choices as in [R1]
    """
    top1 = config.router_aux_loss_type == "top1"
    count_E = statistics.first_choice_E if top1 else statistics.choice_E
    share_E = count_E / count_E.sum()  # Switch eq. 5: f_e, the share of choices
    mean_p_E = statistics.p_sum_E / statistics.sub_tokens  # Switch eq. 6: P_e, the mean probability
    # Switch eq. 4, P2 eq. 10: aux = E sum_e f_e P_e
    return float(len(mean_p_E) * np.sum(share_E * mean_p_E))


def z_loss(statistics: RouterStatistics) -> float:
    r"""z = mean_s logsumexp(logits_s)^2.

    Equation z = \frac{1}{n_c} \sum_m \left( \log \sum_e \exp l_{me} \right)^2
    Shapes   statistics
    Source   [spec 4 z-loss], [ST-MoE eq. 5]
    """
    # ST-MoE eq. 5: mean_s (log sum_e exp(logits[s, e]))^2
    return statistics.squared_log_sum_exp / statistics.sub_tokens


def router_losses(sums: RouterSums, sub_tokens: int, config: ModelConfig) -> RouterLosses:
    """What the balance loss and the z-loss send into one layer's router: their backwards' constants.

    How many choices there are follows from how many sub-tokens count: nothing is asked of the device.
    The counts themselves carry no gradient.

    Shapes   sums
    Source   [spec 4 aux], [spec 4 z-loss]
    """
    top1 = config.router_aux_loss_type == "top1"
    return RouterLosses(
        count_E=sums.first_choice_E if top1 else sums.choice_E,
        choices=sub_tokens if top1 else sub_tokens * config.num_experts_per_tok,
        sub_tokens=sub_tokens,
        daux=config.router_aux_loss_coef,
        dz=config.router_z_loss_coef,
    )
