"""The Numba backend's own `exp`, on which its softmaxes and activations stand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mhmoe_np.operations.numba_cpu.arithmetic import exp
from mhmoe_np.operations.numba_cpu.compiling import task


@task
def exponentials(x_N: Any, y_N: Any) -> None:
    for n in range(len(x_N)):
        y_N[n] = exp(x_N[n])


def compiled_exp(x: Any) -> Any:
    y = np.empty_like(x)
    exponentials(x, y)
    return y


def test_float32_exp_is_within_3e_7_on_its_range() -> None:
    rng = np.random.default_rng(58)
    even = np.linspace(-87, 88, 1_000_003)
    near_zero = rng.choice([-1, 1], 200_000) * 2.0 ** rng.uniform(-40, 0, 200_000)
    halves = (np.arange(-251, 254) / 2) * math.log(2)  # where k steps and r is largest
    steps = np.concatenate([np.nextafter(halves.astype(np.float32), d) for d in (-100, 100)])
    x = np.concatenate([even, near_zero, halves, steps, [0.0, -0.0]]).astype(np.float32)
    x = x[(x >= -87) & (x <= 88)]
    true = np.exp(x.astype(np.float64))
    assert (np.abs(compiled_exp(x) - true) / true).max() < 3e-7
    assert (compiled_exp(np.zeros(2, np.float32)) == 1).all()


def test_float32_exp_does_not_fall_by_more_than_its_last_place() -> None:
    # Neighbouring numbers around every step of k, where the two sides use other
    # powers of two. One unit in the last place is what rounding alone may take.
    steps = (np.arange(-124, 126) + 0.5) * math.log(2)
    around = steps.astype(np.float32).view(np.int32)[:, None] + np.arange(-200, 201, dtype=np.int32)
    x = np.sort(around.view(np.float32), axis=1)
    y = compiled_exp(x.ravel()).reshape(x.shape)
    assert (np.diff(y, axis=1) >= -np.spacing(y[:, 1:])).all()
    assert (y[:, -1] > y[:, 0]).all()


def test_float32_exp_beyond_its_range_is_0_or_infinite() -> None:
    x = np.array([-87, 88, -87.7, 88.4, -104, 89, -1e30, 1e30, -math.inf, math.inf], np.float32)
    low, high = compiled_exp(x)[:2]
    assert 0 < low < high < np.inf
    assert compiled_exp(x)[2:].tolist() == [0, math.inf] * 4


def test_float64_exp_is_the_librarys() -> None:
    x = np.linspace(-700, 700, 100_001)
    # Two libraries, each correct to about one unit in the last place.
    np.testing.assert_allclose(compiled_exp(x), np.exp(x), rtol=4 * np.finfo(float).eps)
