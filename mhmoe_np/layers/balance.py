"""Router statistics, the balance loss and the z-loss of one MoE layer.

The losses are sums over a batch that may come in several micro-batches: each contributes its
statistics, which add up, and the losses are formed from the totals.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from mhmoe_np.operations.table import Dispatch, Routing
from mhmoe_np.types import BoolArray, FloatArray, IntArray

BalanceType = Literal["top1", "topk"]


class RouterStatistics(NamedTuple):
    """Sums over the counted sub-tokens (those of padded positions are left out)."""

    sub_tokens: int
    first_choice_E: IntArray  # how many chose e first
    choice_E: IntArray  # how many chose e at all, before any is dropped
    p_sum_E: FloatArray
    squared_log_sum_exp: float
    dropped: int  # choices of counted sub-tokens beyond an expert's capacity

    def merged(self, other: RouterStatistics) -> RouterStatistics:
        """The statistics of two micro-batches together."""
        return RouterStatistics(
            self.sub_tokens + other.sub_tokens,
            self.first_choice_E + other.first_choice_E,
            self.choice_E + other.choice_E,
            self.p_sum_E + other.p_sum_E,
            self.squared_log_sum_exp + other.squared_log_sum_exp,
            self.dropped + other.dropped,
        )


def router_statistics(routing: Routing, dispatch: Dispatch, counted_M: BoolArray) -> RouterStatistics:
    """The statistics of one layer on one micro-batch."""
    E = routing.p_ME.shape[1]
    chosen = routing.expert_MK[counted_M]
    return RouterStatistics(
        sub_tokens=len(chosen),
        first_choice_E=np.bincount(chosen[:, 0], minlength=E),
        choice_E=np.bincount(chosen.ravel(), minlength=E),
        p_sum_E=counted_M.astype(routing.p_ME.dtype) @ routing.p_ME,
        squared_log_sum_exp=float(np.sum(np.square(routing.log_sum_exp_M[counted_M]))),
        dropped=int(np.count_nonzero(dispatch.slot_MK[counted_M] < 0)),
    )


def expert_share(statistics: RouterStatistics, kind: BalanceType) -> FloatArray:
    """f_E: the share of first choices (top1) or of all choices (topk) that went to each expert."""
    count_E = statistics.first_choice_E if kind == "top1" else statistics.choice_E
    return count_E / count_E.sum()


def balance_loss(statistics: RouterStatistics, kind: BalanceType) -> float:
    """aux = E * sum_e f_e * mean_s p[s, e]: 1 when balanced.

    Source   [spec 4]; Switch Transformer (arXiv 2101.03961) eq. 4-6, first choices as in [R1].
    """
    mean_p_E = statistics.p_sum_E / statistics.sub_tokens
    return float(len(mean_p_E) * np.sum(expert_share(statistics, kind) * mean_p_E))


def balance_loss_backward(share_E: FloatArray, *, daux: float, sub_tokens: int) -> FloatArray:
    """dp_E: what every counted sub-token's p receives; f carries no gradient.

    aux = E * sum_e f_e * (1/M) sum_s p[s, e], hence dp[s, e] = daux * E * f_e / M.
    """
    return daux * len(share_E) * share_E / sub_tokens


def z_loss(statistics: RouterStatistics) -> float:
    """z = mean_s logsumexp(logits_s)^2.

    Source   [spec 4]; ST-MoE (arXiv 2202.08906) eq. 5.
    """
    return statistics.squared_log_sum_exp / statistics.sub_tokens


def z_loss_backward(
    log_sum_exp_M: FloatArray, counted_M: BoolArray, *, dz: float, sub_tokens: int
) -> FloatArray:
    """dlog_sum_exp_M = dz * 2 * logsumexp / M where counted."""
    return log_sum_exp_M * counted_M * log_sum_exp_M.dtype.type(2 * dz / sub_tokens)
