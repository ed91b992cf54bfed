"""The gated activation."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    EDGES,
    FAST,
    LENGTHS,
    NUMPY,
    SEEDS,
    TINY,
    WIDTHS,
    Inputs,
    agree,
    always,
    is_the_derivative,
    near,
    of_each_activation,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    quick,
    unchanged,
)


@of_each_activation
@given(N=TINY, F=TINY, seed=SEEDS)
@quick(30)
def test_up_is_gated_by_the_activation_of_gate(activation: Any, N: int, F: int, seed: int) -> None:
    # [GLU eq. 5], [spec 2 FFN]
    gate_up = Inputs(seed, float)(N, 2 * F, spread=3.0)
    expected = [dumb.gated(row, activation) for row in gate_up.tolist()]
    near(NUMPY.gated_activation(gate_up, activation=activation), expected)


@of_each_fast_backend
@of_each_dtype
@of_each_activation
@always([{"N": N, "F": 7, "spread": 1.0, "seed": 8} for N in EDGES])
# Far outside the range of a float32 exp, and of a float64 one.
@always([{"N": 70, "F": 9, "spread": spread, "seed": 9} for spread in (100.0, 1000.0)])
@given(N=LENGTHS, F=WIDTHS, spread=st.sampled_from([0.0, 1.0, 5.0, 100.0]), seed=SEEDS)
@quick(15)
def test_gated_activation_agrees(
    dtype: Any, name: str, activation: Any, N: int, F: int, spread: float, seed: int
) -> None:
    r, ops = Inputs(seed, dtype), FAST[name]
    gate_up, dh = r(N, 2 * F, spread=spread), r(N, F)
    gate, up = (np.abs(part) for part in np.split(gate_up, 2, axis=1))
    # exp is 0 where its result would be below the smallest normal number, or nearly.
    floor = np.finfo(dtype).tiny / np.finfo(dtype).eps
    with unchanged(gate_up, dh):
        agree(
            ops.gated_activation(gate_up, activation=activation),
            NUMPY.gated_activation(gate_up, activation=activation),
            gate * up * floor,
        )
        # silu' = s + g s (1 - s): for a large g, the rounding of 1 - s is multiplied by g.
        s = np.exp(-np.logaddexp(0, -gate_up[:, :F]))  # sigmoid
        size = np.concatenate(
            [np.abs(dh) * up * (s + floor) * (1 + gate), np.abs(dh) * gate * floor], axis=1
        )
        agree(
            ops.gated_activation_backward(dh, gate_up, activation=activation),
            NUMPY.gated_activation_backward(dh, gate_up, activation=activation),
            size,
        )


@of_each_backend
@of_each_activation
def test_gated_activation_backward_is_the_derivative(name: str, activation: Any) -> None:
    # [GLU eq. 5], [spec 2 FFN]
    rng = np.random.default_rng(25)
    is_the_derivative(
        operation_checks.gated_activation(BACKENDS[name], rng, activation=activation, rows=70)
    )
