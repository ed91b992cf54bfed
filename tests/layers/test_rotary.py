"""The angles of rotary positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.layers.rotary import rotary_tables
from tests.operations.cases import BACKENDS, DTYPES, NUMPY, Inputs, near, of_each_backend, quick


@of_each_backend
@given(
    positions=st.integers(1, 20),
    C=st.sampled_from([2, 4, 6, 10]),
    theta=st.sampled_from([10.0, 10_000.0, 500_000.0]),
)
@quick(30)
def test_position_y_turns_pair_j_by_y_over_theta_to_the_2j_over_c(
    name: str, positions: int, C: int, theta: float
) -> None:
    # [spec 2 RoPE]
    tables = rotary_tables(positions, C, theta, np.float64, ops=BACKENDS[name])
    cos, sin, minus_sin, _ = (BACKENDS[name].to_host(table) for table in tables)
    assert cos.shape == sin.shape == minus_sin.shape == (positions, C // 2)
    for y in range(positions):
        for j in range(C // 2):
            angle = y * theta ** (-2 * j / C)
            assert cos[y, j] == pytest.approx(math.cos(angle), rel=0, abs=1e-14)
            assert sin[y, j] == pytest.approx(math.sin(angle), rel=0, abs=1e-14)
    np.testing.assert_array_equal(minus_sin, -sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_computed_in_float64_and_rounded_once(dtype: Any) -> None:
    exact = rotary_tables(5000, 8, 10_000.0, np.float64, ops=NUMPY)
    tables = rotary_tables(5000, 8, 10_000.0, dtype, ops=NUMPY)
    for table, in_float64 in zip(tables[:3], exact[:3], strict=True):
        assert table.dtype == dtype
        np.testing.assert_array_equal(table, in_float64.astype(dtype))


@of_each_backend
def test_rows_are_turned_by_the_positions_from_the_first_on(name: str) -> None:
    cos, sin, *_ = rotary_tables(12, 6, 100.0, np.float64, ops=NUMPY)
    x = Inputs(4, float)(2, 5, 3, 6)
    turned, expected = x.copy(), x.copy()
    BACKENDS[name].rotate_in_place(turned, cos, sin, np.array([3]))
    BACKENDS[name].rotate_in_place(expected, cos[3:8].copy(), sin[3:8].copy(), None)
    np.testing.assert_array_equal(turned, expected)


@of_each_backend
@given(shift=st.integers(0, 30), seed=st.integers(0, 99))
@quick(20)
def test_a_score_depends_on_how_far_apart_two_positions_are(name: str, shift: int, seed: int) -> None:
    ops, r = BACKENDS[name], Inputs(seed, float)
    tables = rotary_tables(40, 8, 50.0, np.float64, ops=NUMPY)
    q, k = r(1, 9, 1, 8), r(1, 9, 1, 8)
    q[:, 1:], k[:, 1:] = q[:, :1], k[:, :1]  # the same vector everywhere
    scores = []
    for first in (0, shift):
        turned = q.copy(), k.copy()
        for x in turned:
            ops.rotate_in_place(x, *tables[:2], np.array([first]))
        scores.append(turned[0][0, :, 0] @ turned[1][0, :, 0].T)
    near(scores[1], scores[0])
    for distance in range(-8, 9):  # constant along every diagonal
        diagonal = np.diagonal(scores[0], distance)
        near(diagonal, np.full_like(diagonal, diagonal[0]))
    near(scores[0][0, 0], q[0, 0, 0] @ k[0, 0, 0])


@of_each_backend
def test_turning_keeps_lengths_and_the_way_back_undoes_it(name: str) -> None:
    ops, r = BACKENDS[name], Inputs(3, float)
    rotary = rotary_tables(9, 6, 100.0, np.float64, ops=NUMPY)
    rotary = rotary._replace(first_1=np.array([2]))
    x = r(2, 7, 3, 6)
    turned = x.copy()
    ops.rotate_in_place(turned, rotary.cos_YJ, rotary.sin_YJ, rotary.first_1)
    assert not np.allclose(turned, x)
    near((turned**2).sum(axis=3), (x**2).sum(axis=3))
    ops.rotate_in_place(turned, rotary.cos_YJ, rotary.minus_sin_YJ, rotary.first_1)
    near(turned, x)
