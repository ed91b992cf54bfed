"""AdamW on one flat buffer, and the norm that clipping needs."""

from __future__ import annotations

import math

import numpy as np

from mhmoe_np.types import FloatArray


def add_sum_of_squares(x_P: FloatArray, total_1: FloatArray) -> None:
    """See `Operations.add_sum_of_squares`."""
    total_1 += np.sum(x_P.astype(np.float64) ** 2)


def adamw_in_place(
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
    learning_rate, beta1, beta2, epsilon, weight_decay, clip_norm, debias1, debias2 = update_8.tolist()
    norm = math.sqrt(squares_1[0])
    g_P = gradient_P * parameter_P.dtype.type(min(1.0, clip_norm / max(norm, 1e-30)))
    # AdamW algorithm 2: p -= lr (decay p + m^ / (sqrt(v^) + epsilon))
    first_P = beta1 * first_moment_P + (1 - beta1) * g_P
    second_P = beta2 * second_moment_P + (1 - beta2) * g_P**2
    mean_P = first_P / debias1
    root_P = np.sqrt(second_P / debias2) + epsilon
    new_P = parameter_P - learning_rate * (weight_decay * parameter_P + mean_P / root_P)
    fine_P = np.isfinite(first_P) & np.isfinite(second_P) & np.isfinite(new_P)
    np.copyto(first_moment_P, first_P, where=fine_P)
    np.copyto(second_moment_P, second_P, where=fine_P)
    np.copyto(parameter_P, new_P, where=fine_P)
    np.copyto(gradient_P, 0, where=fine_P)
    left_out_1 += np.count_nonzero(~fine_P)
