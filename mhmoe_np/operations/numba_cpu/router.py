"""The router, a block of sub-tokens a task: softmax and top-k without a sort."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import bits_of, exp, row_dot, row_max, row_sum
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.operations.table import Routing
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


class _Routes(NamedTuple):
    """What `Operations.route` reads and writes."""

    logits_ME: Any
    normalise: bool
    p_ME: Any
    log_sum_exp_M: Any
    expert_MK: Any
    gate_MK: Any


@tasks_of(_Routes)
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


class _RoutesBackward(NamedTuple):
    """What `Operations.route_backward` reads and writes."""

    dgate_MK: Any
    dp_E: Any
    dlog_sum_exp_M: Any
    p_ME: Any
    expert_MK: Any
    gate_MK: Any
    counted_M: Any
    normalise: bool
    dlogits_ME: Any


@tasks_of(_RoutesBackward)
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
        shift = a.dlog_sum_exp_M[m] - row_dot(dlogits_E, p_E)
        for e in range(E):
            dlogits_E[e] = p_E[e] * (dlogits_E[e] + shift)


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
        run(_Routes(logits_ME, normalise, *routing), blocks(M, ROWS_ELEMENTWISE), macs=macs)
        return routing

    def route_backward(
        self,
        dgate_MK: FloatArray,
        dp_E: FloatArray,
        dlog_sum_exp_M: FloatArray,
        routing: Routing,
        counted_M: BoolArray,
        *,
        normalise: bool,
    ) -> FloatArray:
        """See `Operations.route_backward`."""
        dlogits_ME: FloatArray = self.empty(routing.p_ME.shape, routing.p_ME.dtype)
        region = _RoutesBackward(
            dgate_MK,
            dp_E,
            dlog_sum_exp_M,
            routing.p_ME,
            routing.expert_MK,
            routing.gate_MK,
            counted_M,
            normalise,
            dlogits_ME,
        )
        macs = dlogits_ME.size * ELEMENT_MACS
        run(region, blocks(len(dlogits_ME), ROWS_ELEMENTWISE), macs=macs)
        return dlogits_ME
