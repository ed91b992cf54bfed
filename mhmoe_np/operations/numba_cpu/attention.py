"""Rotary positions and attention: one task is a head and a block of query rows.

The scores of a block live in its own [rows, S] array, keys up to the diagonal only, so memory is
linear in S. Follows FlashAttention (Dao et al., arXiv 2205.14135) in keeping only the rows'
log-sum-exp and recomputing the probabilities in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_dot, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.few_rows import four_dots
from mhmoe_np.operations.numba_cpu.gemm import gemm_nn, gemm_nt, gemm_tn
from mhmoe_np.operations.numba_cpu.regions import ELEMENT_MACS, blocks, run, tasks_of
from mhmoe_np.operations.numpy_ref.attention import extended, rows_from
from mhmoe_np.types import FloatArray, IntArray

QUERY_ROWS = 64
STEP_HEADS = 4  # key/value heads of one task in a step of decoding


class Rotate(NamedTuple):
    """What `Operations.rotate_in_place` reads and writes: a task is a block of one sequence."""

    x_BTAC: Any
    cos_TJ: Any
    sin_TJ: Any


@task
def rotate_row(x_C: Any, cos_J: Any, sin_J: Any) -> None:
    """Turn each pair of one head by its angle."""
    J = len(cos_J)
    for j in range(J):
        real, imaginary = x_C[j], x_C[j + J]
        x_C[j] = real * cos_J[j] - imaginary * sin_J[j]
        x_C[j + J] = imaginary * cos_J[j] + real * sin_J[j]


@tasks_of(Rotate)
def _rotate(i: int, a: Any) -> None:
    _, T, heads, _ = a.x_BTAC.shape
    across = blocks(T, QUERY_ROWS)
    b, first = i // across, i % across * QUERY_ROWS
    for t in range(first, min(T, first + QUERY_ROWS)):
        for head in range(heads):
            rotate_row(side_by_side(a.x_BTAC[b, t, head]), a.cos_TJ[t], a.sin_TJ[t])


class Attend(NamedTuple):
    """What `Operations.attention` reads and writes: a task is a head and a block of its queries."""

    q_BTAC: Any
    k_BSGC: Any
    v_BSGC: Any
    out_BTAC: Any
    log_sum_exp_BAT: Any


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
def _attend_block(q_TC: Any, k_SC: Any, v_SC: Any, out_TC: Any, log_sum_exp_T: Any) -> None:
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


@tasks_of(Attend)
def _attend(i: int, a: Any) -> None:
    _, T, A, _ = a.q_BTAC.shape
    S, G = a.k_BSGC.shape[1:3]
    across = blocks(T, QUERY_ROWS)
    b, head, first = i // (A * across), i // across % A, i % across * QUERY_ROWS
    g, last = head // (A // G), min(T, first + QUERY_ROWS)
    seen = S - T + last
    _attend_block(
        a.q_BTAC[b, first:last, head],
        a.k_BSGC[b, :seen, g],
        a.v_BSGC[b, :seen, g],
        a.out_BTAC[b, first:last, head],
        a.log_sum_exp_BAT[b, head, first:last],
    )


class AttendStep(NamedTuple):
    """A step of decoding, T = 1: a task is one sequence and some of its key/value heads."""

    q_BTAC: Any
    k_BSGC: Any
    v_BSGC: Any
    out_BTAC: Any
    log_sum_exp_BAT: Any


@task
def _add_rows(p_S: Any, v_SC: Any, out_C: Any) -> None:
    """out += p @ v for up to four rows."""
    if len(p_S) == 4:
        first_C, second_C, third_C, fourth_C = v_SC[0], v_SC[1], v_SC[2], v_SC[3]
        first, second, third, fourth = p_S[0], p_S[1], p_S[2], p_S[3]
        for c in range(len(out_C)):
            out_C[c] += (
                first * first_C[c] + second * second_C[c] + third * third_C[c] + fourth * fourth_C[c]
            )
        return
    for s in range(len(p_S)):
        p, v_C = p_S[s], v_SC[s]
        for c in range(len(out_C)):
            out_C[c] += p * v_C[c]


@tasks_of(AttendStep)
def _attend_step(i: int, a: Any) -> None:
    """Position by position, so that the cache is read once and in the order in which it lies.

    Head by head it would be fetched from memory in pieces of one head.
    """
    real = a.q_BTAC.dtype.type
    A, C = a.q_BTAC.shape[2:]
    S, G = a.k_BSGC.shape[1:3]
    group, across = A // G, blocks(G, STEP_HEADS)
    b, first = i // across, i % across * STEP_HEADS
    heads = range(first * group, min(first + STEP_HEADS, G) * group)
    q_AC, k_SGC, v_SGC, out_AC = a.q_BTAC[b, 0], a.k_BSGC[b], a.v_BSGC[b], a.out_BTAC[b, 0]
    scores_AS = np.empty((A, S), a.q_BTAC.dtype)
    scale = real(C**-0.5)
    fours = S // 4 * 4
    for s in range(0, fours, 4):
        for head in heads:
            k_4C, score_S = k_SGC[s : s + 4, head // group], scores_AS[head]
            dots = four_dots(q_AC[head], k_4C[0], k_4C[1], k_4C[2], k_4C[3])
            score_S[s], score_S[s + 1], score_S[s + 2], score_S[s + 3] = dots
    for s in range(fours, S):
        for head in heads:
            scores_AS[head, s] = row_dot(q_AC[head], k_SGC[s, head // group])
    for head in heads:
        score_S = scores_AS[head]
        for s in range(S):
            score_S[s] *= scale
        highest = row_max(score_S, S)
        for s in range(S):
            score_S[s] = exp(score_S[s] - highest)
        total = row_sum(score_S, S)
        for s in range(S):
            score_S[s] /= total
        a.log_sum_exp_BAT[b, head, 0] = highest + np.log(total)
        out_AC[head] = 0
    for s in range(0, S, 4):
        for head in heads:
            _add_rows(scores_AS[head, s : s + 4], v_SGC[s : s + 4, head // group], out_AC[head])


class AttendBackward(NamedTuple):
    """What `Operations.attention_backward` reads and writes.

    A task is a key/value head: it alone adds to that head's dk and dv.
    """

    dout_BTAC: Any
    q_BTAC: Any
    k_BTGC: Any
    v_BTGC: Any
    out_BTAC: Any
    log_sum_exp_BAT: Any
    dq_BTAC: Any
    dk_BTGC: Any
    dv_BTGC: Any


@task
def _probabilities(scores_TS: Any, first_visible: int, log_sum_exp_T: Any) -> None:
    """Turn scores into softmax, 0 beyond the diagonal."""
    for t in range(scores_TS.shape[0]):
        row_S = scores_TS[t]
        visible = first_visible + t
        for s in range(visible):
            row_S[s] = exp(row_S[s] - log_sum_exp_T[t])
        for s in range(visible, scores_TS.shape[1]):
            row_S[s] = 0


@task
def _attend_block_backward(b: int, head: int, first: int, a: Any) -> None:
    """One block of one head's queries: writes dq, adds to dk and dv."""
    _, T, A, C = a.q_BTAC.shape
    g = head // (A // a.k_BTGC.shape[2])
    last = min(T, first + QUERY_ROWS)
    q_TC, k_SC, v_SC = a.q_BTAC[b, first:last, head], a.k_BTGC[b, :last, g], a.v_BTGC[b, :last, g]
    dout_TC, out_TC = a.dout_BTAC[b, first:last, head], a.out_BTAC[b, first:last, head]
    scale = C**-0.5
    p_TS = np.empty((last - first, last), q_TC.dtype)
    ds_TS = np.empty((last - first, last), q_TC.dtype)
    gemm_nt(scale, q_TC, k_SC, 0.0, p_TS)
    _probabilities(p_TS, first + 1, a.log_sum_exp_BAT[b, head, first:last])
    gemm_tn(1.0, p_TS, dout_TC, 1.0, a.dv_BTGC[b, :last, g])
    gemm_nt(1.0, dout_TC, v_SC, 0.0, ds_TS)
    for t in range(last - first):
        dot = row_dot(side_by_side(dout_TC[t]), side_by_side(out_TC[t]))
        p_S, ds_S = p_TS[t], ds_TS[t]
        for s in range(last):
            ds_S[s] = p_S[s] * (ds_S[s] - dot)
    gemm_nn(scale, ds_TS, k_SC, 0.0, a.dq_BTAC[b, first:last, head])
    gemm_tn(scale, ds_TS, q_TC, 1.0, a.dk_BTGC[b, :last, g])


@tasks_of(AttendBackward)
def _attend_backward(i: int, a: Any) -> None:
    T, A = a.q_BTAC.shape[1:3]
    G = a.k_BTGC.shape[2]
    b, g = i // G, i % G
    for t in range(T):
        a.dk_BTGC[b, t, g, :] = 0
        a.dv_BTGC[b, t, g, :] = 0
    for head in range(g * (A // G), (g + 1) * (A // G)):
        for first in range(0, T, QUERY_ROWS):
            _attend_block_backward(b, head, first, a)


class Attention(Buffers):
    """See `Operations`: rotary positions and attention."""

    def rotate_in_place(
        self, x_BTAC: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray | None
    ) -> None:
        """See `Operations.rotate_in_place`."""
        T = x_BTAC.shape[1]
        cos_TJ, sin_TJ = (rows_from(table_YJ, first_1, T) for table_YJ in (cos_YJ, sin_YJ))
        tasks = len(x_BTAC) * blocks(T, QUERY_ROWS)
        run(Rotate(x_BTAC, cos_TJ, sin_TJ), tasks, macs=x_BTAC.size * ELEMENT_MACS)

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.attention`."""
        B, T, A, _ = q_BTAC.shape
        out_BTAC = self.empty(q_BTAC.shape, q_BTAC.dtype)
        log_sum_exp_BAT = self.empty((B, A, T), q_BTAC.dtype)
        arrays = q_BTAC, k_BSGC, v_BSGC, out_BTAC, log_sum_exp_BAT
        macs = 2 * q_BTAC.size * k_BSGC.shape[1]
        if T == 1:
            run(AttendStep(*arrays), B * blocks(k_BSGC.shape[2], STEP_HEADS), macs=macs)
        else:
            run(Attend(*arrays), B * A * blocks(T, QUERY_ROWS), macs=macs)
        return out_BTAC, log_sum_exp_BAT

    def attention_with_cache(
        self,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        kv_BS2GC: FloatArray,
        filled_1: IntArray,
    ) -> FloatArray:
        """See `Operations.attention_with_cache`."""
        return self.attention(q_BTAC, *extended(k_BTGC, v_BTGC, kv_BS2GC, filled_1))[0]

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
        region = AttendBackward(
            dout_BTAC,
            q_BTAC,
            k_BTGC,
            v_BTGC,
            out_BTAC,
            log_sum_exp_BAT,
            dq_BTAC,
            dk_BTGC,
            dv_BTGC,
        )
        B, T, G, _ = k_BTGC.shape
        run(region, B * G, macs=5 * q_BTAC.size * T)
