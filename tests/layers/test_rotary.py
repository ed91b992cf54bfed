"""The angles of rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhmoe_np.layers.rotary import rotary_tables
from mhmoe_np.operations.load import load_operations

NUMPY = load_operations("numpy")


# [spec 2 RoPE]
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_position_y_turns_pair_j_by_y_theta_to_the_minus_2j_over_c(dtype: Any) -> None:
    cos_YJ, sin_YJ, minus_sin_YJ = rotary_tables(50, 8, 10000.0, dtype, ops=NUMPY)
    assert cos_YJ.shape == sin_YJ.shape == (50, 4)
    assert cos_YJ.dtype == dtype
    for y, j in ((0, 0), (1, 0), (7, 1), (49, 3)):
        angle = y * 10000.0 ** (-2 * j / 8)
        assert cos_YJ[y, j] == dtype(np.cos(angle))
        assert sin_YJ[y, j] == dtype(np.sin(angle))
        assert minus_sin_YJ[y, j] == -sin_YJ[y, j]


def test_a_window_has_the_angles_of_its_positions() -> None:
    tables = rotary_tables(9, 4, 100.0, np.float64, ops=NUMPY)
    window = tables.window(3, 5)
    for whole, part in zip(tables, window, strict=True):
        np.testing.assert_array_equal(part, whole[3:5])


def test_turning_there_and_back_changes_nothing_and_keeps_lengths() -> None:
    angles = rotary_tables(6, 8, 10000.0, np.float64, ops=NUMPY).window(0, 6)
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 8))
    turned = x.copy()
    NUMPY.rotate_in_place(turned, angles.cos_TJ, angles.sin_TJ)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose((turned**2).sum(axis=3), (x**2).sum(axis=3), rtol=1e-13)
    NUMPY.rotate_in_place(turned, angles.cos_TJ, angles.minus_sin_TJ)
    np.testing.assert_allclose(turned, x, rtol=0, atol=1e-14)


def test_products_of_turned_rows_depend_on_their_distance_alone() -> None:
    angles = rotary_tables(20, 8, 10000.0, np.float64, ops=NUMPY).window(0, 20)
    q, k = np.random.default_rng(1).standard_normal((2, 8))
    rows = np.stack([np.tile(q, (20, 1)), np.tile(k, (20, 1))])[:, :, None]
    NUMPY.rotate_in_place(rows, angles.cos_TJ, angles.sin_TJ)
    products = rows[0, :, 0] @ rows[1, :, 0].T
    for distance in (0, 3, 11):
        np.testing.assert_allclose(np.diag(products, distance), products[0, distance], rtol=1e-12)
