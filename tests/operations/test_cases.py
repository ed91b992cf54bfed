"""What `agree` lets pass and what it does not: all other files stand on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.operations.cases import agree, of_each_dtype, unchanged


@of_each_dtype
def test_a_small_entry_beside_a_large_one_must_be_right_too(dtype: Any) -> None:
    right = np.array([1e-4, 1e4], dtype)
    agree(right.copy(), right)
    wrong = right.copy()
    wrong[0] *= 1 + 32 * np.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"part 0 at \(.*0"):
        agree(wrong, right)
    agree(wrong, right, np.array([1e-3, 0]))  # where it is the rest of larger numbers
    with pytest.raises(AssertionError):
        agree(wrong, right, np.array([0, 1e-3]))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.zeros(3), np.zeros(4)),
        (np.zeros(3, np.float32), np.zeros(3)),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([np.nan]), np.array([0.0])),
        (np.array([np.nan]), np.array([np.nan])),
        ([np.zeros(1)], [np.zeros(1), np.zeros(1)]),
        ([np.zeros(1)], [None]),
        ([None], [np.zeros(1)]),
    ],
)
def test_other_shapes_kinds_and_numbers_do_not_agree(actual: Any, expected: Any) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        agree(actual, expected)


def test_a_changed_argument_is_seen() -> None:
    x, y = np.zeros(3), np.zeros(3)
    with unchanged(x):
        y[0] = 1
    with pytest.raises(AssertionError), unchanged(x, (y, None)):
        y[0] = 2
