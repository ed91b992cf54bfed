"""AdamW in one pass over the flat buffer, and the norm that clipping needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import blocks, parallel, reduction, task
from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.types import FloatArray

CHUNK = 1 << 15


@reduction
def _squares(x_P: Any) -> float:
    total = 0.0
    for p in range(len(x_P)):
        total += np.float64(x_P[p]) * np.float64(x_P[p])
    return total


@parallel
def _squares_of_chunks(x_P: Any, chunk: int, sums: Any) -> None:
    for i in prange(len(sums)):
        sums[i] = _squares(x_P[i * chunk : (i + 1) * chunk])


@task
def _adamw_chunk(
    parameter_P: Any,
    gradient_P: Any,
    first_P: Any,
    second_P: Any,
    scale: float,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    correction1: float,
    correction2: float,
) -> None:
    real = parameter_P.dtype.type
    g_scale, keep1, keep2 = real(scale), real(beta1), real(beta2)
    # Rounded once: 1 - (rounded beta) would be off by far more when beta is near 1.
    rest1, rest2 = real(1 - beta1), real(1 - beta2)
    unbias1, unbias2 = real(1 / correction1), real(1 / correction2)
    step, shrink, small = real(rate), real(1 - rate * decay), real(epsilon)
    for p in range(len(parameter_P)):
        g = gradient_P[p] * g_scale
        first = keep1 * first_P[p] + rest1 * g
        second = keep2 * second_P[p] + rest2 * g * g
        first_P[p], second_P[p], gradient_P[p] = first, second, 0
        move = first * unbias1 / (np.sqrt(second * unbias2) + small)
        parameter_P[p] = parameter_P[p] * shrink - step * move


@parallel
def _adamw(
    parameter_P: Any,
    gradient_P: Any,
    first_P: Any,
    second_P: Any,
    scale: float,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    correction1: float,
    correction2: float,
    chunk: int,
) -> None:
    for i in prange((len(parameter_P) + chunk - 1) // chunk):
        p, z = i * chunk, (i + 1) * chunk
        _adamw_chunk(
            parameter_P[p:z],
            gradient_P[p:z],
            first_P[p:z],
            second_P[p:z],
            scale,
            rate,
            beta1,
            beta2,
            epsilon,
            decay,
            correction1,
            correction2,
        )


class Optimiser(Buffers):
    """See `Operations`: the optimiser."""

    def add_sum_of_squares(self, x_P: FloatArray, total_1: FloatArray) -> None:
        """See `Operations.add_sum_of_squares`. Chunks in parallel, their sums in order."""
        sums = np.empty(blocks(len(x_P), CHUNK))
        _squares_of_chunks(x_P, CHUNK, sums)
        total_1 += sums.sum()

    def adamw_in_place(
        self,
        parameter_P: FloatArray,
        gradient_P: FloatArray,
        first_moment_P: FloatArray,
        second_moment_P: FloatArray,
        squares_1: FloatArray,
        guard: FloatArray,
        *,
        step: int,
        settings: AdamWSettings,
    ) -> None:
        """See `Operations.adamw_in_place`."""
        if not np.isfinite(guard).all():
            return
        norm = math.sqrt(squares_1[0])
        gradient_scale = min(1.0, settings.clip_norm / max(norm, 1e-30))
        _adamw(
            parameter_P,
            gradient_P,
            first_moment_P,
            second_moment_P,
            gradient_scale,
            settings.learning_rate,
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.weight_decay,
            1 - settings.beta1**step,
            1 - settings.beta2**step,
            CHUNK,
        )
