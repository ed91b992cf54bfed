"""The router, a block of sub-tokens a task: softmax and top-k without a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_dot, row_max, row_sum
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import ROWS_ELEMENTWISE, exact, parallel, task
from mhmoe_np.operations.table import RouterLosses, Routing
from mhmoe_np.types import BoolArray, FloatArray


@exact
def _first_equal(x_E: Any, value: Any) -> Any:
    """The lowest index at which x is `value`; len(x) if there is none."""
    first = np.int32(len(x_E))
    for e in range(len(x_E)):
        here = np.int32(e) if x_E[e] == value else np.int32(len(x_E))
        first = min(first, here)
    return first


@task
def _first_free(E: int, taken_J: Any) -> Any:
    for e in range(E):
        free = True
        for j in range(len(taken_J)):
            free = free and taken_J[j] != e
        if free:
            return e
    return 0  # never: fewer than E are taken


@task
def _choose(p_E: Any, left_E: Any, expert_K: Any) -> None:
    """The K largest, largest first, equal ones in index order; left_E is room for those left.

    K times the largest of what is left, which vectorises where a sort would not. NaN is never equal to
    anything: with NaN in p_E the lowest free index is taken, so that indices stay valid.
    """
    E = len(p_E)
    for e in range(E):
        left_E[e] = p_E[e]
    for j in range(len(expert_K)):
        best = _first_equal(left_E, row_max(left_E, E))
        if best == E:
            best = _first_free(E, expert_K[:j])
        left_E[best] = -1  # below every probability
        expert_K[j] = best


@task
def _route_rows(
    logits_ME: Any, normalise: bool, p_ME: Any, log_sum_exp_M: Any, expert_MK: Any, gate_MK: Any
) -> None:
    real = logits_ME.dtype.type
    M, E = logits_ME.shape
    K = expert_MK.shape[1]
    left_E = np.empty(E, p_ME.dtype)
    for m in range(M):
        logits_E, p_E = logits_ME[m], p_ME[m]
        highest = row_max(logits_E, E)
        for e in range(E):
            p_E[e] = exp(logits_E[e] - highest)
        total = row_sum(p_E, E)
        log_sum_exp_M[m] = highest + np.log(total)
        for e in range(E):
            p_E[e] /= total
        _choose(p_E, left_E, expert_MK[m])
        chosen = real(0)
        for j in range(K):
            gate_MK[m, j] = p_E[expert_MK[m, j]]
            chosen += gate_MK[m, j]
        if normalise:
            for j in range(K):
                gate_MK[m, j] /= chosen


@parallel
def _route(
    logits_ME: Any,
    normalise: bool,
    p_ME: Any,
    log_sum_exp_M: Any,
    expert_MK: Any,
    gate_MK: Any,
    rows: int,
) -> None:
    for block in prange((logits_ME.shape[0] + rows - 1) // rows):
        m, z = block * rows, (block + 1) * rows
        _route_rows(
            logits_ME[m:z], normalise, p_ME[m:z], log_sum_exp_M[m:z], expert_MK[m:z], gate_MK[m:z]
        )


@task
def _route_rows_backward(
    dgate_MK: Any,
    dp_E: Any,
    dlog_sum_exp_M: Any,
    p_ME: Any,
    expert_MK: Any,
    gate_MK: Any,
    counted_M: Any,
    normalise: bool,
    dlogits_ME: Any,
) -> None:
    real = p_ME.dtype.type
    M, E = p_ME.shape
    K = expert_MK.shape[1]
    for m in range(M):
        p_E, expert_K, dlogits_E = p_ME[m], expert_MK[m], dlogits_ME[m]
        for e in range(E):
            dlogits_E[e] = dp_E[e] if counted_M[m] else real(0)
        total, pull = real(1), real(0)
        if normalise:
            total = real(0)
            for j in range(K):
                total += p_E[expert_K[j]]
                pull += dgate_MK[m, j] * gate_MK[m, j]
        for j in range(K):
            dlogits_E[expert_K[j]] += (dgate_MK[m, j] - pull) / total
        shift = dlog_sum_exp_M[m] - row_dot(dlogits_E, p_E)
        for e in range(E):
            dlogits_E[e] = p_E[e] * (dlogits_E[e] + shift)


@parallel
def _route_backward(
    dgate_MK: Any,
    dp_E: Any,
    dlog_sum_exp_M: Any,
    p_ME: Any,
    expert_MK: Any,
    gate_MK: Any,
    counted_M: Any,
    normalise: bool,
    dlogits_ME: Any,
    rows: int,
) -> None:
    for block in prange((p_ME.shape[0] + rows - 1) // rows):
        m, z = block * rows, (block + 1) * rows
        _route_rows_backward(
            dgate_MK[m:z],
            dp_E,
            dlog_sum_exp_M[m:z],
            p_ME[m:z],
            expert_MK[m:z],
            gate_MK[m:z],
            counted_M[m:z],
            normalise,
            dlogits_ME[m:z],
        )


class Router(Buffers):
    """See `Operations`: the router."""

    add_router_statistics = staticmethod(numpy_ref.add_router_statistics)

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """See `Operations.route`."""
        M = len(logits_ME)
        routing = Routing(
            p_ME=self.empty(logits_ME.shape, logits_ME.dtype),
            log_sum_exp_M=self.empty((M,), logits_ME.dtype),
            expert_MK=self.empty((M, top_k), np.int64),
            gate_MK=self.empty((M, top_k), logits_ME.dtype),
        )
        if M <= ROWS_ELEMENTWISE:
            _route_rows(logits_ME, normalise, *routing)
        else:
            _route(logits_ME, normalise, *routing, ROWS_ELEMENTWISE)
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
        real = routing.p_ME.dtype.type
        count_E, choices, sub_tokens, daux, dz = losses
        dp_E = (daux * len(count_E) * (count_E / choices) / sub_tokens).astype(real)
        dlog_sum_exp_M = routing.log_sum_exp_M * counted_M * real(2 * dz / sub_tokens)
        dlogits_ME: FloatArray = self.empty(routing.p_ME.shape, routing.p_ME.dtype)
        _route_backward(
            dgate_MK,
            dp_E,
            dlog_sum_exp_M,
            routing.p_ME,
            routing.expert_MK,
            routing.gate_MK,
            counted_M,
            normalise,
            dlogits_ME,
            ROWS_ELEMENTWISE,
        )
        return dlogits_ME
