"""AdamW in one pass over the flat buffer, and the norm that clipping needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import exact, reduction
from mhmoe_np.operations.numba_cpu.regions import ELEMENT_MACS, block, blocks, run, tasks_of
from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.types import FloatArray

CHUNK = 1 << 15  # numbers of one task


@reduction
def _sum_of_squares(x_P: Any) -> float:
    total = 0.0
    for p in range(len(x_P)):
        total += np.float64(x_P[p]) * np.float64(x_P[p])
    return total


class Squares(NamedTuple):
    """The sums of x^2 of all chunks."""

    x_P: Any
    sums: Any  # [chunks]


@tasks_of(Squares)
def _squares(i: int, a: Any) -> None:
    a.sums[i] = _sum_of_squares(a.x_P[block(i, CHUNK)])


class AdamW(NamedTuple):
    """One update, a chunk of the parameters a task."""

    parameter_P: Any
    gradient_P: Any
    first_moment_P: Any
    second_moment_P: Any
    gradient_scale: float
    unbias1: float  # 1 / (1 - beta1^step)
    unbias2: float
    settings: AdamWSettings
    left_out: Any  # [chunks]


# Rounds as written: what may be contracted is contracted otherwise in a kernel that was just compiled
# than in the same one read from the cache: a run's first sitting would not have the bits of later ones.
@tasks_of(AdamW, exact)
def _adamw(i: int, a: Any) -> None:
    real = a.parameter_P.dtype.type
    rate, beta1, beta2, epsilon, decay, _ = a.settings
    g_scale, keep1, keep2 = real(a.gradient_scale), real(beta1), real(beta2)
    # Rounded once: 1 - (rounded beta) would be off by far more when beta is near 1.
    rest1, rest2 = real(1 - beta1), real(1 - beta2)
    unbias1, unbias2 = real(a.unbias1), real(a.unbias2)
    step, shrink, small = real(rate), real(1 - rate * decay), real(epsilon)
    chunk = block(i, CHUNK)
    parameter_P, gradient_P = a.parameter_P[chunk], a.gradient_P[chunk]
    first_P, second_P = a.first_moment_P[chunk], a.second_moment_P[chunk]
    # Numbers of 4 bytes alone, and nothing is written or not by condition: 8 at a time with AVX2.
    zero, left_out = real(0), np.int32(0)
    for p in range(len(parameter_P)):
        gradient, parameter = gradient_P[p], parameter_P[p]
        first, second = first_P[p], second_P[p]
        g = gradient * g_scale
        new_first = keep1 * first + rest1 * g
        new_second = keep2 * second + rest2 * g * g
        move = new_first * unbias1 / (np.sqrt(new_second * unbias2) + small)
        new_parameter = parameter * shrink - step * move
        # 0 times a number is 0 unless that is not finite: one comparison for all three.
        finite = new_first * zero + new_second * zero + new_parameter * zero == zero
        parameter_P[p] = new_parameter if finite else parameter
        first_P[p] = new_first if finite else first
        second_P[p] = new_second if finite else second
        gradient_P[p] = zero if finite else gradient
        left_out = np.int32(left_out + (np.int32(0) if finite else np.int32(1)))
    a.left_out[i] = left_out


class Optimiser(Buffers):
    """See `Operations`: the optimiser."""

    def add_sum_of_squares(self, x_P: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum_of_squares`. The chunks' sums add up in order."""
        sums = np.empty(blocks(len(x_P), CHUNK))
        run(Squares(x_P, sums), len(sums), macs=len(x_P) * ELEMENT_MACS)
        total_1 += sums.sum()

    def adamw_in_place(
        self,
        parameter_P: FloatArray,
        gradient_P: FloatArray,
        first_moment_P: FloatArray,
        second_moment_P: FloatArray,
        squares_1: FloatArray,
        guard: FloatArray,
        left_out_1: FloatArray,
        update_8: FloatArray,
    ) -> None:
        """See `Operations.adamw_in_place`."""
        if not np.isfinite(guard).all():
            return
        arrays = parameter_P, gradient_P, first_moment_P, second_moment_P
        *numbers, debias1, debias2 = update_8.tolist()
        settings = AdamWSettings(*numbers)
        gradient_scale = min(1.0, settings.clip_norm / max(math.sqrt(squares_1[0]), 1e-30))
        unbias1, unbias2 = 1 / debias1, 1 / debias2
        chunks = blocks(len(parameter_P), CHUNK)
        region = AdamW(*arrays, gradient_scale, unbias1, unbias2, settings, np.empty(chunks))
        run(region, chunks, macs=len(parameter_P) * ELEMENT_MACS)
        left_out_1 += region.left_out.sum()
