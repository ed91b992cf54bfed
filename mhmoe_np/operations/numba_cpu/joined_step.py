"""A step of decoding, from the first branch to the last, as one region of phases.

One token of each sequence is so little work that calls, allocations and the waking of threads cost
more than reading the weights. Here nothing is allocated, threads are woken once, and every weight is
read once, in order. What is computed is what `layers.block.block_forward` does with the operations of
the table, and it is written with the same pieces: `norm_rows`, `rotate_row`, `activate_rows`.

A branch is three phases or two. What all tasks of a phase need and is quickly computed, as the norm of
a row, each worker computes for itself: waiting for another one to do it would take longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import get_num_threads, types
from numba.np.numpy_support import carray

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_dot, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.attention import rotate_row
from mhmoe_np.operations.numba_cpu.compiling import task, typed_intrinsic
from mhmoe_np.operations.numba_cpu.feed_forward import activate_rows
from mhmoe_np.operations.numba_cpu.few_rows import few_rows_nt, four_dots
from mhmoe_np.operations.numba_cpu.gemm import FEW_ROWS
from mhmoe_np.operations.numba_cpu.norm import norm_rows
from mhmoe_np.operations.numba_cpu.phases import end_phase, new_counters, next_task
from mhmoe_np.operations.numba_cpu.regions import blocks, run, tasks_of
from mhmoe_np.operations.table import (
    Activation,
    AttentionBranch,
    Branch,
    FeedForwardBranch,
    JoinedStep,
)
from mhmoe_np.types import FloatArray, IntArray

MOST_SEQUENCES = FEW_ROWS
POSITIONS = 64  # of one task of attention
TASK_NUMBERS = 1 << 14  # weights of one task, about
MOST_OUTPUTS = 64  # of one task
# Columns of the table of addresses; a missing sub-norm's is 0.
NORM, FIRST, SUB_NORM, SECOND, CACHE = range(5)


class AllBranches(NamedTuple):
    """What all branches read and write; task i is worker i."""

    x_ND: Any  # goes in and comes out
    cos_J: Any  # of this position
    sin_J: Any
    first: int  # positions in the cache before this one
    eps: float
    silu: bool
    inner: int  # width of the feed-forward branches
    key_value_heads: int
    positions: int  # that the cache has room for
    addresses: Any  # int64 [branches, 5], of each branch's arrays
    attends: Any  # bool [branches]: whether it is an attention branch
    q_BAC: Any
    parts_of_out: Any  # [B, parts, A, C], a part being some positions
    parts_of_highest: Any  # [B, parts, A], the largest score
    parts_of_total: Any  # [B, parts, A], of the exponentials
    h_BF: Any
    # What follows has an entry for each worker.
    normed_of_workers: Any  # [workers, B, D]
    attended_of_workers: Any  # [workers, B, A*C]
    h_of_workers: Any  # [workers, B, F], after the sub-norm
    rstd_of_workers: Any  # [workers, B]
    outputs_of_workers: Any  # [workers, B, 2*MOST_OUTPUTS]
    scores_of_workers: Any  # [workers, A, POSITIONS]
    counters: Any


@typed_intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """An address as that of numbers of the dtype of `like`."""
    pointer = types.CPointer(like.dtype)  # type: ignore[no-untyped-call]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(types.int64, like), code


@task
def _array(address: int, like: Any, shape: Any) -> Any:
    """The array of that shape that lies at an address."""
    return carray(_pointer(address, like), shape)


@task
def _outputs_of_task(inputs: int) -> int:
    """How many outputs of so many inputs each are a task: a multiple of 4."""
    return max(4, min(MOST_OUTPUTS, TASK_NUMBERS // inputs // 4 * 4))


@task
def _project_head(head: int, w_CD: Any, normed_BD: Any, kv_BS2GC: Any, a: Any) -> None:
    """One head of the joint projection, rotated, to where it is read."""
    A = a.q_BAC.shape[1]
    out_BC = a.q_BAC[:, head] if head < A else kv_BS2GC[:, a.first, head - A]
    few_rows_nt(normed_BD, w_CD, out_BC)
    if head < A + a.key_value_heads:
        for b in range(len(out_BC)):
            rotate_row(side_by_side(out_BC[b]), a.cos_J, a.sin_J)


@task
def _attend_part(
    q_AC: Any, kv_S2GC: Any, scores_AS: Any, out_AC: Any, highest_A: Any, total_A: Any
) -> None:
    """Attention to some positions alone: out has still to be divided by total.

    Position by position, so that the cache is read once and in the order in which it lies.
    """
    real = q_AC.dtype.type
    A, C = q_AC.shape
    S, G = kv_S2GC.shape[0], kv_S2GC.shape[1] // 2
    group, scale = A // G, real(C**-0.5)
    fours = S // 4 * 4
    for s in range(0, fours, 4):
        for head in range(A):
            g = head // group
            dots = four_dots(
                q_AC[head], kv_S2GC[s, g], kv_S2GC[s + 1, g], kv_S2GC[s + 2, g], kv_S2GC[s + 3, g]
            )
            score_S = scores_AS[head]
            score_S[s], score_S[s + 1] = dots[0] * scale, dots[1] * scale
            score_S[s + 2], score_S[s + 3] = dots[2] * scale, dots[3] * scale
    for s in range(fours, S):
        for head in range(A):
            scores_AS[head, s] = row_dot(q_AC[head], kv_S2GC[s, head // group]) * scale
    for head in range(A):
        score_S, out_C = scores_AS[head], out_AC[head]
        highest = row_max(score_S, S)
        for s in range(S):
            score_S[s] = exp(score_S[s] - highest)
        highest_A[head], total_A[head] = highest, row_sum(score_S, S)
        for c in range(C):
            out_C[c] = 0
    for s in range(0, fours, 4):
        for head in range(A):
            g, score_S, out_C = G + head // group, scores_AS[head], out_AC[head]
            v_C, next_C = kv_S2GC[s, g], kv_S2GC[s + 1, g]
            third_C, fourth_C = kv_S2GC[s + 2, g], kv_S2GC[s + 3, g]
            p, p_next, p_third, p_fourth = score_S[s], score_S[s + 1], score_S[s + 2], score_S[s + 3]
            for c in range(C):
                out_C[c] += (
                    p * v_C[c] + p_next * next_C[c] + p_third * third_C[c] + p_fourth * fourth_C[c]
                )
    for s in range(fours, S):
        for head in range(A):
            p, v_C, out_C = scores_AS[head, s], kv_S2GC[s, G + head // group], out_AC[head]
            for c in range(C):
                out_C[c] += p * v_C[c]


@task
def _combine(b: int, parts: int, attended_I: Any, a: Any) -> None:
    """Attention to all positions, from the parts."""
    A, C = a.q_BAC.shape[1:]
    for head in range(A):
        highest = a.parts_of_highest[b, 0, head]
        for part in range(1, parts):
            highest = max(highest, a.parts_of_highest[b, part, head])
        total = a.x_ND.dtype.type(0)
        for part in range(parts):
            weight = exp(a.parts_of_highest[b, part, head] - highest)
            total += weight * a.parts_of_total[b, part, head]
        out_C = attended_I[head * C : (head + 1) * C]
        for c in range(C):
            out_C[c] = 0
        for part in range(parts):
            weight = exp(a.parts_of_highest[b, part, head] - highest) / total
            part_C = a.parts_of_out[b, part, head]
            for c in range(C):
                out_C[c] += weight * part_C[c]


@task
def _add_product(x_BI: Any, w_OI: Any, first: int, worker: int, a: Any) -> None:
    """Outputs first, first + 1, ... of the way back into the model's width, added to x."""
    outputs = len(w_OI)
    y_BO = a.outputs_of_workers[worker, :, :outputs]
    few_rows_nt(x_BI, w_OI, y_BO)
    for b in range(len(x_BI)):
        for o in range(outputs):
            a.x_ND[b, first + o] += y_BO[b, o]


@task
def _attention_branch(worker: int, branch: int, phase: int, a: Any) -> int:
    """x += W_o attention(...) of norm(x); the phase that follows."""
    x_ND, address, counters, first = a.x_ND, a.addresses[branch], a.counters, a.first
    B, D = x_ND.shape
    A, C = a.q_BAC.shape[1:]
    G = a.key_value_heads
    kv_BS2GC = _array(address[CACHE], x_ND, (B, a.positions, 2 * G, C))
    rstd_B = a.rstd_of_workers[worker]

    w_QD = _array(address[FIRST], x_ND, ((A + 2 * G) * C, D))
    normed_BD, done = a.normed_of_workers[worker], 0
    i = next_task(counters, phase, A + 2 * G)
    if i >= 0:
        norm_rows(x_ND, _array(address[NORM], x_ND, D), a.eps, normed_BD, rstd_B)
    while i >= 0:
        _project_head(i, w_QD[i * C : (i + 1) * C], normed_BD, kv_BS2GC, a)
        done += 1
        i = next_task(counters, phase, A + 2 * G)
    end_phase(counters, phase, done, A + 2 * G)

    phase, done, parts = phase + 1, 0, blocks(first + 1, POSITIONS)
    i = next_task(counters, phase, B * parts)
    while i >= 0:
        b, part = i // parts, i % parts
        seen_S2GC = kv_BS2GC[b, part * POSITIONS : min(first + 1, (part + 1) * POSITIONS)]
        _attend_part(
            a.q_BAC[b],
            seen_S2GC,
            a.scores_of_workers[worker],
            a.parts_of_out[b, part],
            a.parts_of_highest[b, part],
            a.parts_of_total[b, part],
        )
        done += 1
        i = next_task(counters, phase, B * parts)
    end_phase(counters, phase, done, B * parts)

    phase, done, attended_BI = phase + 1, 0, a.attended_of_workers[worker]
    w_DI = _array(address[SECOND], x_ND, (D, A * C))
    outputs = _outputs_of_task(A * C)
    i = next_task(counters, phase, blocks(D, outputs))
    if i >= 0:
        for b in range(B):
            _combine(b, parts, attended_BI[b], a)
        if address[SUB_NORM] != 0:
            sub_norm_I = _array(address[SUB_NORM], x_ND, A * C)
            norm_rows(attended_BI, sub_norm_I, a.eps, attended_BI, rstd_B)
    while i >= 0:
        _add_product(attended_BI, w_DI[i * outputs : (i + 1) * outputs], i * outputs, worker, a)
        done += 1
        i = next_task(counters, phase, blocks(D, outputs))
    end_phase(counters, phase, done, blocks(D, outputs))
    return phase + 1


@task
def _feed_forward_branch(worker: int, branch: int, phase: int, a: Any) -> int:
    """x += W_down (act(gate) * up) of norm(x); the phase that follows."""
    x_ND, address, counters = a.x_ND, a.addresses[branch], a.counters
    D, F = x_ND.shape[1], a.inner
    rstd_B = a.rstd_of_workers[worker]

    w_2FD = _array(address[FIRST], x_ND, (2 * F, D))
    normed_BD, done = a.normed_of_workers[worker], 0
    outputs = _outputs_of_task(2 * D)
    i = next_task(counters, phase, blocks(F, outputs))
    if i >= 0:
        norm_rows(x_ND, _array(address[NORM], x_ND, D), a.eps, normed_BD, rstd_B)
    while i >= 0:
        first, last = i * outputs, min(F, (i + 1) * outputs)
        gate_up_B2F = a.outputs_of_workers[worker, :, : 2 * (last - first)]
        few_rows_nt(normed_BD, w_2FD[first:last], gate_up_B2F[:, : last - first])
        few_rows_nt(normed_BD, w_2FD[F + first : F + last], gate_up_B2F[:, last - first :])
        activate_rows(gate_up_B2F, a.silu, a.h_BF[:, first:last])
        done += 1
        i = next_task(counters, phase, blocks(F, outputs))
    end_phase(counters, phase, done, blocks(F, outputs))

    phase, done, h_BF = phase + 1, 0, a.h_BF
    w_DF = _array(address[SECOND], x_ND, (D, F))
    outputs = _outputs_of_task(F)
    i = next_task(counters, phase, blocks(D, outputs))
    if address[SUB_NORM] != 0:
        h_BF = a.h_of_workers[worker]
        if i >= 0:
            norm_rows(a.h_BF, _array(address[SUB_NORM], x_ND, F), a.eps, h_BF, rstd_B)
    while i >= 0:
        _add_product(h_BF, w_DF[i * outputs : (i + 1) * outputs], i * outputs, worker, a)
        done += 1
        i = next_task(counters, phase, blocks(D, outputs))
    end_phase(counters, phase, done, blocks(D, outputs))
    return phase + 1


@tasks_of(AllBranches)
def _all_branches(worker: int, a: Any) -> None:
    # A literal 0 would be a type of its own and compile what follows once more.
    phase: Any = np.intp(0)
    for branch in range(len(a.addresses)):
        if a.attends[branch]:
            phase = _attention_branch(worker, branch, phase, a)
        else:
            phase = _feed_forward_branch(worker, branch, phase, a)


def _shapes(branch: Branch) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if array is None else array.shape for array in branch)


def can_be_joined(branches: Sequence[Branch]) -> bool:
    """Whether `Joined` computes them: attention first, few sequences, weights that are floats."""
    arrays = [array for branch in branches for array in branch if array is not None]
    return (
        len(branches) > 0
        and isinstance(branches[0], AttentionBranch)
        and all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in arrays)
        and len({np.asarray(array).dtype for array in arrays}) == 1
        and all(
            len({_shapes(branch) for branch in branches if isinstance(branch, kind)}) <= 1
            for kind in (AttentionBranch, FeedForwardBranch)
        )
        and len(branches[0].kv_BS2GC) <= MOST_SEQUENCES
    )


def _most_threads() -> int:
    """How many workers there can ever be in this process."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return most


class Joined:
    """The work of some branches, with all memory that it needs."""

    def __init__(self, branches: Sequence[Branch], *, activation: Activation, eps: float) -> None:
        """Of branches that `can_be_joined`."""
        self._branches = branches  # what the addresses are of must stay
        attention = branches[0]
        assert isinstance(attention, AttentionBranch)
        B, positions, doubled, C = attention.kv_BS2GC.shape
        Q, D = attention.qkv_QD.shape
        F = next((b.down_DF.shape[1] for b in branches if isinstance(b, FeedForwardBranch)), 0)
        G, A = doubled // 2, Q // C - doubled
        dtype, workers = attention.norm_D.dtype, _most_threads()
        parts = blocks(positions, POSITIONS)

        def floats(*shape: int) -> FloatArray:
            return np.zeros(shape, dtype)

        self._eps, self._silu, self._sizes = eps, activation == "silu", (F, G, positions)
        self._counters = new_counters(3 * len(branches))
        self._memory = (
            np.array([_addresses(branch) for branch in branches]),
            np.array([isinstance(branch, AttentionBranch) for branch in branches]),
            floats(B, A, C),
            floats(B, parts, A, C),
            floats(B, parts, A),
            floats(B, parts, A),
            floats(B, F),
            floats(workers, B, D),
            floats(workers, B, A * C),
            floats(workers, B, F),
            floats(workers, B),
            floats(workers, B, 2 * MOST_OUTPUTS),
            floats(workers, A, POSITIONS),
            self._counters,
        )
        self._macs = B * sum(
            math.prod(matrix.shape)
            for branch in branches
            for matrix in (
                (branch.qkv_QD, branch.out_DI)
                if isinstance(branch, AttentionBranch)
                else (branch.gate_up_2FD, branch.down_DF)
            )
        )

    def __call__(
        self, x_ND: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray
    ) -> None:
        """See `Operations.joined_step`."""
        first = int(first_1[0])
        self._counters[...] = 0
        region = AllBranches(
            x_ND,
            cos_YJ[first],
            sin_YJ[first],
            first,
            self._eps,
            self._silu,
            *self._sizes,
            *self._memory,
        )
        run(region, get_num_threads(), macs=self._macs)


def _addresses(branch: Branch) -> list[int]:
    """Of a branch's arrays, in the order of its fields; 0 where there is none."""
    found = [array.ctypes.data if isinstance(array, np.ndarray) else 0 for array in branch]
    return found + [0] * (CACHE + 1 - len(found))


class JoinedSteps:
    """See `Operations`: what is joined."""

    def joined_step(
        self, branches: Sequence[Branch], *, activation: Activation, eps: float
    ) -> JoinedStep | None:
        """See `Operations.joined_step`."""
        if not can_be_joined(branches):
            return None
        return Joined(branches, activation=activation, eps=eps)
