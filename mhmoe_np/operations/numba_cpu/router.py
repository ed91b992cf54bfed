"""The router, a block of sub-tokens a task: softmax and top-k without a sort."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import bits_of, exp, row_dot, row_max, row_sum
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact, task
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.operations.table import Dispatch, RouterLosses, RouterSums, Routing
from mhmoe_np.types import BoolArray, FloatArray


@exact
def _choose(p_E: Any, rank_E: Any, expert_K: Any) -> None:
    """The K largest, largest first, equal ones in index order, NaN last; rank_E has room for integers.

    K passes are faster than a sort, and than passes that vectorise. Integers are compared, and those
    taken rank below all: whatever p_E holds, no expert is chosen twice.
    """
    E = len(p_E)
    for e in range(E):
        # The bits of numbers that are not negative order as the numbers do.
        rank_E[e] = bits_of(p_E[e]) + 1 if p_E[e] >= 0 else 0
    for j in range(len(expert_K)):
        best = 0
        for e in range(1, E):
            if rank_E[e] > rank_E[best]:
                best = e
        rank_E[best] = -1
        expert_K[j] = best


class Routes(NamedTuple):
    """What `Operations.route` reads and writes."""

    logits_ME: Any
    normalise: bool
    p_ME: Any
    log_sum_exp_M: Any
    expert_MK: Any
    gate_MK: Any


@tasks_of(Routes)
def _route(i: int, a: Any) -> None:
    real = a.p_ME.dtype.type
    (M, E), K = a.logits_ME.shape, a.expert_MK.shape[1]
    rank_E = np.empty(E, np.int64)
    first = i * ROWS_ELEMENTWISE
    for m in range(first, min(first + ROWS_ELEMENTWISE, M)):
        logits_E, p_E = a.logits_ME[m], a.p_ME[m]
        highest = row_max(logits_E, E)
        for e in range(E):
            p_E[e] = exp(logits_E[e] - highest)
        total = row_sum(p_E, E)
        a.log_sum_exp_M[m] = highest + np.log(total)
        for e in range(E):
            p_E[e] /= total
        _choose(p_E, rank_E, a.expert_MK[m])
        chosen = real(0)
        for j in range(K):
            a.gate_MK[m, j] = p_E[a.expert_MK[m, j]]
            chosen += a.gate_MK[m, j]
        if a.normalise:
            for j in range(K):
                a.gate_MK[m, j] /= chosen


class RoutesBackward(NamedTuple):
    """What `Operations.route_backward` reads and writes."""

    dgate_MK: Any
    p_ME: Any
    log_sum_exp_M: Any
    expert_MK: Any
    gate_MK: Any
    counted_M: Any
    dp_E: Any  # that each counted sub-token's p receives from the balance loss
    z_factor: float  # times its log-sum-exp is what that receives from the z-loss
    normalise: bool
    dlogits_ME: Any


@tasks_of(RoutesBackward)
def _route_backward(i: int, a: Any) -> None:
    real = a.p_ME.dtype.type
    (M, E), K = a.p_ME.shape, a.expert_MK.shape[1]
    first = i * ROWS_ELEMENTWISE
    for m in range(first, min(first + ROWS_ELEMENTWISE, M)):
        p_E, expert_K, dlogits_E = a.p_ME[m], a.expert_MK[m], a.dlogits_ME[m]
        for e in range(E):
            dlogits_E[e] = a.dp_E[e] if a.counted_M[m] else real(0)
        total, pull = real(1), real(0)
        if a.normalise:
            total = real(0)
            for j in range(K):
                total += p_E[expert_K[j]]
                pull += a.dgate_MK[m, j] * a.gate_MK[m, j]
        for j in range(K):
            dlogits_E[expert_K[j]] += (a.dgate_MK[m, j] - pull) / total
        shift = -row_dot(dlogits_E, p_E)
        if a.counted_M[m]:
            shift += a.log_sum_exp_M[m] * real(a.z_factor)
        for e in range(E):
            dlogits_E[e] = p_E[e] * (dlogits_E[e] + shift)


@task
def _add_statistics(routing: Any, slot_MK: Any, counted_M: Any, sums: Any) -> None:
    """One thread, in the order of the sub-tokens, in float64."""
    real = routing.p_ME.dtype.type
    M, K = routing.expert_MK.shape
    p_E = np.zeros(len(sums.p_E))
    squares = 0.0
    for m in range(M):
        if counted_M[m]:
            for e in range(len(p_E)):
                p_E[e] += routing.p_ME[m, e]
            squares += np.float64(routing.log_sum_exp_M[m]) ** 2
            sums.first_choice_E[routing.expert_MK[m, 0]] += 1
            for j in range(K):
                e = routing.expert_MK[m, j]
                sums.choice_E[e] += 1
                sums.dropped_E[e] += slot_MK[m, j] < 0
    for e in range(len(p_E)):
        sums.p_E[e] = real(sums.p_E[e]) + real(p_E[e])
    sums.squared_log_sum_exp_1[0] += real(squares)


class Router(Buffers):
    """See `Operations`: the router."""

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """See `Operations.route`."""
        M = len(logits_ME)
        routing = Routing(
            p_ME=self.empty(logits_ME.shape, logits_ME.dtype),
            log_sum_exp_M=self.empty((M,), logits_ME.dtype),
            expert_MK=self.empty((M, top_k), np.int64),
            gate_MK=self.empty((M, top_k), logits_ME.dtype),
        )
        macs = logits_ME.size * ELEMENT_MACS
        run(Routes(logits_ME, normalise, *routing), blocks(M, ROWS_ELEMENTWISE), macs=macs)
        return routing

    def route_backward(
        self,
        dgate_MK: FloatArray,
        routing: Routing,
        counted_M: BoolArray,
        losses: RouterLosses,
        *,
        normalise: bool,
    ) -> FloatArray:
        """See `Operations.route_backward`."""
        count_E, choices, sub_tokens, daux, dz = losses
        dp_E = daux * len(count_E) * (count_E / choices) / sub_tokens
        dlogits_ME: FloatArray = self.empty(routing.p_ME.shape, routing.p_ME.dtype)
        region = RoutesBackward(
            dgate_MK,
            *routing,
            counted_M,
            dp_E.astype(dlogits_ME.dtype),
            2 * dz / sub_tokens,
            normalise,
            dlogits_ME,
        )
        macs = dlogits_ME.size * ELEMENT_MACS
        run(region, blocks(len(dlogits_ME), ROWS_ELEMENTWISE), macs=macs)
        return dlogits_ME

    def add_router_statistics(
        self, routing: Routing, dispatch: Dispatch, counted_M: BoolArray, sums: RouterSums
    ) -> None:
        """See `Operations.add_router_statistics`."""
        _add_statistics(routing, dispatch.slot_MK, counted_M, sums)
