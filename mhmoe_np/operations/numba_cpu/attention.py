"""Rotary positions and attention: one task is a head and a block of query rows.

The scores of a block live in its own [rows, S] array, keys up to the diagonal only, so memory is
linear in S. Follows FlashAttention (Dao et al., arXiv 2205.14135) in keeping only the rows'
log-sum-exp and recomputing the probabilities in the backward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_dot, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import SERIAL_MACS, blocks, parallel, task
from mhmoe_np.operations.numba_cpu.gemm import four_dots, gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.types import FloatArray

QUERY_ROWS = 64
STEP_HEADS = 4  # key/value heads of one task in a step of decoding


@task
def _rotate_position(x_AC: Any, cos_J: Any, sin_J: Any) -> None:
    J = len(cos_J)
    for a in range(x_AC.shape[0]):
        x_C = side_by_side(x_AC[a])
        for j in range(J):
            first, second = x_C[j], x_C[j + J]
            x_C[j] = first * cos_J[j] - second * sin_J[j]
            x_C[j + J] = second * cos_J[j] + first * sin_J[j]


@task
def _rotate_block(block: int, x_BTAC: Any, cos_TJ: Any, sin_TJ: Any, rows: int) -> None:
    T = x_BTAC.shape[1]
    across = (T + rows - 1) // rows
    b, first = block // across, block % across * rows
    for t in range(first, min(T, first + rows)):
        _rotate_position(x_BTAC[b, t], cos_TJ[t], sin_TJ[t])


@parallel
def _rotate(tasks: int, x_BTAC: Any, cos_TJ: Any, sin_TJ: Any, rows: int) -> None:
    for block in prange(tasks):
        _rotate_block(block, x_BTAC, cos_TJ, sin_TJ, rows)


@task
def _exponentials(scores_TS: Any, first_visible: int, log_sum_exp_T: Any) -> Any:
    """Turn scores into e^(score - row's maximum), 0 beyond the diagonal; return the rows' sums."""
    T, S = scores_TS.shape
    sum_T = np.empty(T, scores_TS.dtype)
    for t in range(T):
        row_S = scores_TS[t]
        visible = first_visible + t
        highest = row_max(row_S, visible)
        for s in range(visible):
            row_S[s] = exp(row_S[s] - highest)
        for s in range(visible, S):
            row_S[s] = 0
        sum_T[t] = row_sum(row_S, visible)
        log_sum_exp_T[t] = highest + np.log(sum_T[t])
    return sum_T


@task
def _attend(q_TC: Any, k_SC: Any, v_SC: Any, out_TC: Any, log_sum_exp_T: Any) -> None:
    """One block of queries, the last of which sees all of k_SC."""
    real = q_TC.dtype.type
    T, S = q_TC.shape[0], k_SC.shape[0]
    scores_TS = np.empty((T, S), q_TC.dtype)
    gemm_nt(q_TC.shape[1] ** -0.5, q_TC, k_SC, 0.0, scores_TS)
    sum_T = _exponentials(scores_TS, S - T + 1, log_sum_exp_T)
    gemm_nn(1.0, scores_TS, v_SC, 0.0, out_TC)
    for t in range(T):
        out_C, inverse = side_by_side(out_TC[t]), real(1) / sum_T[t]
        for c in range(len(out_C)):
            out_C[c] *= inverse


@task
def _attend_task(
    index: int,
    q_BTAC: Any,
    k_BSGC: Any,
    v_BSGC: Any,
    out_BTAC: Any,
    log_sum_exp_BAT: Any,
    rows: int,
) -> None:
    _, T, A, _ = q_BTAC.shape
    S, G = k_BSGC.shape[1:3]
    across = (T + rows - 1) // rows
    b, a, block = index // (A * across), index // across % A, index % across
    g = a // (A // G)
    first = block * rows
    last = min(T, first + rows)
    seen = S - T + last
    _attend(
        q_BTAC[b, first:last, a],
        k_BSGC[b, :seen, g],
        v_BSGC[b, :seen, g],
        out_BTAC[b, first:last, a],
        log_sum_exp_BAT[b, a, first:last],
    )


@parallel
def _attention(
    tasks: int,
    q_BTAC: Any,
    k_BSGC: Any,
    v_BSGC: Any,
    out_BTAC: Any,
    log_sum_exp_BAT: Any,
    rows: int,
) -> None:
    for index in prange(tasks):
        _attend_task(index, q_BTAC, k_BSGC, v_BSGC, out_BTAC, log_sum_exp_BAT, rows)


@task
def _add_rows(p_S: Any, v_SC: Any, out_C: Any) -> None:
    """out += p @ v for up to four rows."""
    if len(p_S) == 4:
        first, second, third, fourth = v_SC[0], v_SC[1], v_SC[2], v_SC[3]
        a, b, c, d = p_S[0], p_S[1], p_S[2], p_S[3]
        for i in range(len(out_C)):
            out_C[i] += a * first[i] + b * second[i] + c * third[i] + d * fourth[i]
        return
    for s in range(len(p_S)):
        p, v_C = p_S[s], v_SC[s]
        for i in range(len(out_C)):
            out_C[i] += p * v_C[i]


@task
def _attend_step(
    index: int, q_BTAC: Any, k_BSGC: Any, v_BSGC: Any, out_BTAC: Any, log_sum_exp_BAT: Any, heads: int
) -> None:
    """One query of one sequence for some key/value heads: a step of decoding.

    Position by position, so that the cache is read once and in the order in which it lies; head by head
    it would be fetched from memory in pieces of one head.
    """
    real = q_BTAC.dtype.type
    A, C = q_BTAC.shape[2:]
    S, G = k_BSGC.shape[1:3]
    group, across = A // G, (G + heads - 1) // heads
    b, first = index // across, index % across * heads
    last = min(first + heads, G)
    q_AC, k_SGC, v_SGC, out_AC = q_BTAC[b, 0], k_BSGC[b], v_BSGC[b], out_BTAC[b, 0]
    scores_AS = np.empty((A, S), q_BTAC.dtype)
    scale = real(C**-0.5)
    fours = S // 4 * 4
    for s in range(0, fours, 4):
        for a in range(first * group, last * group):
            four_dots(q_AC[a], k_SGC[s : s + 4, a // group], scores_AS[a, s : s + 4])
    for s in range(fours, S):
        for a in range(first * group, last * group):
            scores_AS[a, s] = row_dot(q_AC[a], k_SGC[s, a // group])
    for a in range(first * group, last * group):
        score_S = scores_AS[a]
        for s in range(S):
            score_S[s] *= scale
        highest = row_max(score_S, S)
        for s in range(S):
            score_S[s] = exp(score_S[s] - highest)
        total = row_sum(score_S, S)
        for s in range(S):
            score_S[s] /= total
        log_sum_exp_BAT[b, a, 0] = highest + np.log(total)
        out_AC[a] = 0
    for s in range(0, S, 4):
        for a in range(first * group, last * group):
            _add_rows(scores_AS[a, s : s + 4], v_SGC[s : s + 4, a // group], out_AC[a])


@parallel
def _attend_steps(
    tasks: int,
    q_BTAC: Any,
    k_BSGC: Any,
    v_BSGC: Any,
    out_BTAC: Any,
    log_sum_exp_BAT: Any,
    heads: int,
) -> None:
    for index in prange(tasks):
        _attend_step(index, q_BTAC, k_BSGC, v_BSGC, out_BTAC, log_sum_exp_BAT, heads)


@task
def _probabilities(scores_TS: Any, first_visible: int, log_sum_exp_T: Any) -> None:
    for t in range(scores_TS.shape[0]):
        row_S = scores_TS[t]
        visible = first_visible + t
        for s in range(visible):
            row_S[s] = exp(row_S[s] - log_sum_exp_T[t])
        for s in range(visible, scores_TS.shape[1]):
            row_S[s] = 0


@task
def _attend_backward(
    dout_TC: Any,
    q_TC: Any,
    k_SC: Any,
    v_SC: Any,
    out_TC: Any,
    log_sum_exp_T: Any,
    dq_TC: Any,
    dk_SC: Any,
    dv_SC: Any,
) -> None:
    """One block of queries: writes dq, adds to dk and dv."""
    T, S = q_TC.shape[0], k_SC.shape[0]
    scale = q_TC.shape[1] ** -0.5
    p_TS = np.empty((T, S), q_TC.dtype)
    ds_TS = np.empty((T, S), q_TC.dtype)
    gemm_nt(scale, q_TC, k_SC, 0.0, p_TS)
    _probabilities(p_TS, S - T + 1, log_sum_exp_T)
    gemm_tn(1.0, p_TS, dout_TC, 1.0, dv_SC)
    gemm_nt(1.0, dout_TC, v_SC, 0.0, ds_TS)
    for t in range(T):
        dot = row_dot(side_by_side(dout_TC[t]), side_by_side(out_TC[t]))
        p_S, ds_S = p_TS[t], ds_TS[t]
        for s in range(S):
            ds_S[s] = p_S[s] * (ds_S[s] - dot)
    gemm_nn(scale, ds_TS, k_SC, 0.0, dq_TC)
    gemm_tn(scale, ds_TS, q_TC, 1.0, dk_SC)


@parallel
def _attention_backward(
    dout_BTAC: Any,
    q_BTAC: Any,
    k_BTGC: Any,
    v_BTGC: Any,
    out_BTAC: Any,
    log_sum_exp_BAT: Any,
    dq_BTAC: Any,
    dk_BTGC: Any,
    dv_BTGC: Any,
    rows: int,
) -> None:
    """A task is a key/value head: it alone adds to that head's dk and dv."""
    B, T, A, _ = q_BTAC.shape
    G = k_BTGC.shape[2]
    for index in prange(B * G):
        b, g = index // G, index % G
        for t in range(T):
            dk_BTGC[b, t, g, :] = 0
            dv_BTGC[b, t, g, :] = 0
        for a in range(g * (A // G), (g + 1) * (A // G)):
            for block in range((T + rows - 1) // rows):
                first = block * rows
                last = min(T, first + rows)
                _attend_backward(
                    dout_BTAC[b, first:last, a],
                    q_BTAC[b, first:last, a],
                    k_BTGC[b, :last, g],
                    v_BTGC[b, :last, g],
                    out_BTAC[b, first:last, a],
                    log_sum_exp_BAT[b, a, first:last],
                    dq_BTAC[b, first:last, a],
                    dk_BTGC[b, :last, g],
                    dv_BTGC[b, :last, g],
                )


class Attention(Buffers):
    """See `Operations`: rotary positions and attention."""

    def rotate_in_place(self, x_BTAC: FloatArray, cos_TJ: FloatArray, sin_TJ: FloatArray) -> None:
        """See `Operations.rotate_in_place`."""
        tasks = len(x_BTAC) * blocks(x_BTAC.shape[1], QUERY_ROWS)
        if tasks == 1:
            _rotate_block(0, x_BTAC, cos_TJ, sin_TJ, QUERY_ROWS)
        else:
            _rotate(tasks, x_BTAC, cos_TJ, sin_TJ, QUERY_ROWS)

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.attention`."""
        B, T, A, _ = q_BTAC.shape
        out_BTAC = self.empty(q_BTAC.shape, q_BTAC.dtype)
        log_sum_exp_BAT = self.empty((B, A, T), q_BTAC.dtype)
        arrays = q_BTAC, k_BSGC, v_BSGC, out_BTAC, log_sum_exp_BAT
        serial = 2 * q_BTAC.size * k_BSGC.shape[1] <= SERIAL_MACS
        one: Any
        in_parallel: Any
        if T == 1:
            one, in_parallel, rows = _attend_step, _attend_steps, STEP_HEADS
            tasks = B * blocks(k_BSGC.shape[2], STEP_HEADS)
        else:
            one, in_parallel, rows = _attend_task, _attention, QUERY_ROWS
            tasks = B * A * blocks(T, QUERY_ROWS)
        if serial:
            for index in range(tasks):
                one(index, *arrays, rows)
        else:
            in_parallel(tasks, *arrays, rows)
        return out_BTAC, log_sum_exp_BAT

    def attention_backward(
        self,
        dout_BTAC: FloatArray,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        out_BTAC: FloatArray,
        log_sum_exp_BAT: FloatArray,
        dq_BTAC: FloatArray,
        dk_BTGC: FloatArray,
        dv_BTGC: FloatArray,
    ) -> None:
        """See `Operations.attention_backward`."""
        _attention_backward(
            dout_BTAC,
            q_BTAC,
            k_BTGC,
            v_BTGC,
            out_BTAC,
            log_sum_exp_BAT,
            dq_BTAC,
            dk_BTGC,
            dv_BTGC,
            QUERY_ROWS,
        )
