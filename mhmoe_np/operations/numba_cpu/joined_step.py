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
from numba import get_num_threads

from mhmoe_np.operations.numba_cpu.arithmetic import exp, row_dot, row_max, row_sum, side_by_side
from mhmoe_np.operations.numba_cpu.attention import rotate_row
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.feed_forward import activate_rows
from mhmoe_np.operations.numba_cpu.few_rows import four_dots
from mhmoe_np.operations.numba_cpu.gemm import FEW_ROWS
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet
from mhmoe_np.operations.numba_cpu.joined_weights import (
    MOST_OUTPUTS,
    Matrix,
    array_at,
    arrays_of,
    as_matrix,
    granularity,
    multiply,
    outputs_at,
    outputs_of_task,
    prepare,
    scratch_of,
    scratch_of_workers,
)
from mhmoe_np.operations.numba_cpu.norm import norm_rows
from mhmoe_np.operations.numba_cpu.packed import PackedProducts
from mhmoe_np.operations.numba_cpu.phases import end_phase, new_counters, next_task
from mhmoe_np.operations.numba_cpu.regions import blocks, run, tasks_of
from mhmoe_np.operations.table import (
    Activation,
    AttentionBranch,
    Branch,
    FeedForwardBranch,
    JoinedStep,
    Weight,
)
from mhmoe_np.types import FloatArray, IntArray

MOST_SEQUENCES = FEW_ROWS
POSITIONS = 64  # of one task of attention
# Columns of the table of addresses; those of a missing sub-norm, and of floats' scales, are 0.
NORM, FIRST, FIRST_SCALES, SUB_NORM, SECOND, SECOND_SCALES, CACHE = range(7)


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
    addresses: Any  # int64 [branches, 7], of each branch's arrays
    attends: Any  # bool [branches]: whether it is an attention branch
    qkv_QD: Any  # an example of the matrices, like the three that follow
    out_DI: Any
    gate_up_2FD: Any
    down_DF: Any
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
    scratch: Any  # `Scratch` of all workers
    counters: Any


@task
def _project_head(head: int, w_CD: Any, normed_BD: Any, scratch: Any, kv_BS2GC: Any, a: Any) -> None:
    """One head of the joint projection, rotated, to where it is read."""
    A = a.q_BAC.shape[1]
    out_BC = a.q_BAC[:, head] if head < A else kv_BS2GC[:, a.first, head - A]
    multiply(normed_BD, w_CD, scratch, out_BC)
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
def _way_back(
    worker: int, phase: int, i: int, x_BI: Any, w_DI: Any, scratch: Any, at: Any, a: Any
) -> None:
    """The last phase of a branch: x += its second matrix times x_BI, which is prepared.

    i: the first task; w_DI: an example of the matrix; at: the branch's addresses.
    """
    x_ND = a.x_ND
    D, done, outputs = x_ND.shape[1], 0, outputs_of_task(w_DI, x_BI.shape[1])
    while i >= 0:
        first, last = i * outputs, min(D, (i + 1) * outputs)
        y_BO = a.outputs_of_workers[worker, :, : last - first]
        w_OI = outputs_at(w_DI, at[SECOND], at[SECOND_SCALES], first, last)
        multiply(x_BI, w_OI, scratch, y_BO)
        for b in range(len(y_BO)):
            for o in range(last - first):
                x_ND[b, first + o] += y_BO[b, o]
        done += 1
        i = next_task(a.counters, phase, blocks(D, outputs))
    end_phase(a.counters, phase, done, blocks(D, outputs))


@task
def _attention_branch(worker: int, branch: int, phase: int, a: Any) -> int:
    """x += W_o attention(...) of norm(x); the phase that follows."""
    x_ND, address, counters, first = a.x_ND, a.addresses[branch], a.counters, a.first
    B, D = x_ND.shape
    A, C = a.q_BAC.shape[1:]
    G = a.key_value_heads
    kv_BS2GC = array_at(address[CACHE], x_ND, (B, a.positions, 2 * G, C))
    rstd_B, scratch = a.rstd_of_workers[worker], scratch_of(worker, a.scratch)

    normed_BD, done = a.normed_of_workers[worker], 0
    i = next_task(counters, phase, A + 2 * G)
    if i >= 0:
        norm_rows(x_ND, array_at(address[NORM], x_ND, D), a.eps, normed_BD, rstd_B)
        prepare(a.qkv_QD, normed_BD, scratch)
    while i >= 0:
        w_CD = outputs_at(a.qkv_QD, address[FIRST], address[FIRST_SCALES], i * C, (i + 1) * C)
        _project_head(i, w_CD, normed_BD, scratch, kv_BS2GC, a)
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

    phase, attended_BI = phase + 1, a.attended_of_workers[worker]
    i = next_task(counters, phase, blocks(D, outputs_of_task(a.out_DI, A * C)))
    if i >= 0:
        for b in range(B):
            _combine(b, parts, attended_BI[b], a)
        if address[SUB_NORM] != 0:
            sub_norm_I = array_at(address[SUB_NORM], x_ND, A * C)
            norm_rows(attended_BI, sub_norm_I, a.eps, attended_BI, rstd_B)
        prepare(a.out_DI, attended_BI, scratch)
    _way_back(worker, phase, i, attended_BI, a.out_DI, scratch, address, a)
    return phase + 1


@task
def _feed_forward_branch(worker: int, branch: int, phase: int, a: Any) -> int:
    """x += W_down (act(gate) * up) of norm(x); the phase that follows."""
    x_ND, address, counters = a.x_ND, a.addresses[branch], a.counters
    D, F = x_ND.shape[1], a.inner
    rstd_B, scratch = a.rstd_of_workers[worker], scratch_of(worker, a.scratch)
    gate_up, scales = address[FIRST], address[FIRST_SCALES]

    normed_BD, done = a.normed_of_workers[worker], 0
    outputs = outputs_of_task(a.gate_up_2FD, 2 * D)
    i = next_task(counters, phase, blocks(F, outputs))
    if i >= 0:
        norm_rows(x_ND, array_at(address[NORM], x_ND, D), a.eps, normed_BD, rstd_B)
        prepare(a.gate_up_2FD, normed_BD, scratch)
    while i >= 0:
        first, last = i * outputs, min(F, (i + 1) * outputs)
        gate_up_B2F = a.outputs_of_workers[worker, :, : 2 * (last - first)]
        gate_FD = outputs_at(a.gate_up_2FD, gate_up, scales, first, last)
        up_FD = outputs_at(a.gate_up_2FD, gate_up, scales, F + first, F + last)
        multiply(normed_BD, gate_FD, scratch, gate_up_B2F[:, : last - first])
        multiply(normed_BD, up_FD, scratch, gate_up_B2F[:, last - first :])
        activate_rows(gate_up_B2F, a.silu, a.h_BF[:, first:last])
        done += 1
        i = next_task(counters, phase, blocks(F, outputs))
    end_phase(counters, phase, done, blocks(F, outputs))

    phase, h_BF = phase + 1, a.h_BF
    i = next_task(counters, phase, blocks(D, outputs_of_task(a.down_DF, F)))
    if address[SUB_NORM] != 0:
        h_BF = a.h_of_workers[worker]
        if i >= 0:
            norm_rows(a.h_BF, array_at(address[SUB_NORM], x_ND, F), a.eps, h_BF, rstd_B)
    if i >= 0:
        prepare(a.down_DF, h_BF, scratch)
    _way_back(worker, phase, i, h_BF, a.down_DF, scratch, address, a)
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


def weights_of(branch: Branch) -> tuple[Weight, Weight]:
    """A branch's two matrices."""
    if isinstance(branch, AttentionBranch):
        return branch.qkv_QD, branch.out_DI
    return branch.gate_up_2FD, branch.down_DF


class Half(NamedTuple):
    """A branch with its matrices as compiled code takes them."""

    branch: Branch
    first: Matrix
    second: Matrix

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all branches of attention, or all of feed-forward, have in common."""
        matrices = [
            (type(matrix), *((array.shape, array.dtype) for array in arrays_of(matrix)))
            for matrix in (self.first, self.second)
        ]
        norms = self.branch.norm_D.dtype, self.sub_norm is None
        return type(self.branch), *norms, *matrices

    @property
    def sub_norm(self) -> FloatArray | None:
        """The weights between the two matrices."""
        if isinstance(self.branch, AttentionBranch):
            return self.branch.sub_norm_I
        return self.branch.sub_norm_F

    def addresses(self) -> list[int]:
        """A row of `AllBranches.addresses`."""
        found = [0] * (CACHE + 1)
        found[NORM] = self.branch.norm_D.ctypes.data
        if self.sub_norm is not None:
            found[SUB_NORM] = self.sub_norm.ctypes.data
        for place, matrix in ((FIRST, self.first), (SECOND, self.second)):
            for i, array in enumerate(arrays_of(matrix)):
                found[place + i] = array.ctypes.data
        if isinstance(self.branch, AttentionBranch):
            found[CACHE] = self.branch.kv_BS2GC.ctypes.data
        return found


def halves_of(branches: Sequence[Branch], instruction_set: InstructionSet) -> list[Half] | None:
    """The branches as `Joined` takes them; None: it does not.

    It takes attention first, few sequences, branches alike, and matrices that can be cut at heads and
    between gate and up.
    """
    halves = []
    for branch in branches:
        weights = weights_of(branch)
        first, second = (as_matrix(weight, instruction_set) for weight in weights)
        if first is None or second is None:
            return None
        cut = weights[1].shape[-1]
        if isinstance(branch, AttentionBranch):
            cut = branch.kv_BS2GC.shape[-1]
        arrays = (*arrays_of(first), *arrays_of(second))
        if cut % granularity(first) or not all(array.flags.c_contiguous for array in arrays):
            return None
        halves.append(Half(branch, first, second))
    kinds = {half.kind for half in halves}
    if not branches or len(kinds) > len({kind for kind, *_ in kinds}):
        return None
    starts = branches[0]
    joins = isinstance(starts, AttentionBranch) and len(starts.kv_BS2GC) <= MOST_SEQUENCES
    return halves if joins else None


def _most_threads() -> int:
    """How many workers there can ever be in this process."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return most


class Joined:
    """The work of some branches, with all memory that it needs."""

    def __init__(self, halves: Sequence[Half], *, activation: Activation, eps: float) -> None:
        """Of what `halves_of` found."""
        self._halves = halves  # what the addresses are of must stay
        attention = halves[0]
        feed_forward = next((h for h in halves if isinstance(h.branch, FeedForwardBranch)), None)
        assert isinstance(attention.branch, AttentionBranch)
        B, positions, doubled, C = attention.branch.kv_BS2GC.shape
        D, G = len(attention.branch.norm_D), doubled // 2
        A = attention.branch.qkv_QD.shape[-2] // C - doubled
        dtype, workers = attention.branch.norm_D.dtype, _most_threads()
        parts = blocks(positions, POSITIONS)

        def floats(*shape: int) -> FloatArray:
            return np.zeros(shape, dtype)

        F = 0
        matrices: tuple[Matrix, Matrix] = floats(0, D), floats(D, 0)
        if feed_forward is not None:
            F = weights_of(feed_forward.branch)[1].shape[-1]
            matrices = feed_forward.first, feed_forward.second
        self._eps, self._silu, self._sizes = eps, activation == "silu", (F, G, positions)
        self._counters = new_counters(3 * len(halves))
        self._memory = (
            np.array([half.addresses() for half in halves]),
            np.array([isinstance(half.branch, AttentionBranch) for half in halves]),
            *(attention.first, attention.second, *matrices),
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
            scratch_of_workers(workers, B, max(D, A * C, F), dtype),
            self._counters,
        )
        self._macs = B * sum(
            math.prod(weight.shape) for half in halves for weight in weights_of(half.branch)
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


class JoinedSteps(PackedProducts):
    """See `Operations`: what is joined."""

    def joined_step(
        self, branches: Sequence[Branch], *, activation: Activation, eps: float
    ) -> JoinedStep | None:
        """See `Operations.joined_step`."""
        halves = halves_of(branches, self._instruction_set)
        return None if halves is None else Joined(halves, activation=activation, eps=eps)
