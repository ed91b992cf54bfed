"""BitNet's quantisers: every backend gives the bits of the definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.numpy_ref.quantise import straight_through
from mhmoe_np.operations.table import BitWeight
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import cupy_on_cpu
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    CUDA,
    CUDA_NAME,
    FAST,
    NUMPY,
    SEEDS,
    TINY,
    Inputs,
    always,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    of_the_device,
    quantise,
    quick,
    same_bits,
    unchanged,
)

of_each_quantization = pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])

# ---- the definition --------------------------------------------------------------------------


@given(N=TINY, I=TINY, spread=st.sampled_from([0.0, 1e-7, 1.0, 1e6]), seed=SEEDS)
@quick(60)
def test_rows_are_quantised_by_their_largest_number(N: int, I: int, spread: float, seed: int) -> None:
    # [B1 eq. 4-5], [spec 5 activations]
    x = Inputs(seed, float)(N, I, spread=spread)
    q, scale = NUMPY.quantise_rows(x)
    expected = [dumb.quantise_row(row) for row in x.tolist()]
    assert q.tolist() == [row for row, _ in expected]
    assert scale.tolist() == [value for _, value in expected]


@of_each_quantization
@given(heights=st.lists(TINY, min_size=1, max_size=4), I=TINY, seed=SEEDS)
@quick(60)
def test_each_joined_matrix_is_quantised_by_itself(
    quantization: Any, heights: list[int], I: int, seed: int
) -> None:
    # [B1 eq. 1-3, 12], [spec 5 bitnet weights]; [B2 eq. 1-3], [spec 5 bitnet_b158 weights];
    # [spec 5 One β per matrix], [D8]
    r, starts = Inputs(seed, float), (0, *itertools.accumulate(heights))
    w = r(starts[-1], I) * np.repeat(np.abs(r(len(heights))), heights)[:, None]
    before = r.rng.integers(-1, 2, w.shape).astype(float)
    found = quantise(NUMPY, w, starts, quantization, before)
    for x, (first, last) in enumerate(itertools.pairwise(starts)):
        expected, scale = dumb.quantise_matrix(w[first:last].tolist(), quantization)
        assert found.q[first:last].tolist() == expected
        assert found.beta[first:last].tolist() == [scale] * (last - first)
        flat = [value for row in expected for value in row]
        flips = sum(a != b for a, b in zip(flat, before[first:last].ravel(), strict=True))
        assert found.report[x].tolist() == [scale, *(flat.count(v) for v in (-1, 0, 1)), flips]


# ---- one backend and the other ---------------------------------------------------------------


@of_each_fast_backend
@of_each_dtype
@always([{"N": n, "I": 33, "spread": 1.0, "seed": 14} for n in (63, 64, 65, 257)])
@given(
    N=st.integers(1, 20),
    I=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1e-40, 1e-6, 1.0, 1e37]),
    seed=SEEDS,
)
@quick(40)
def test_rows_are_quantised_to_the_bits_of_the_definition(
    name: str, dtype: Any, N: int, I: int, spread: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    x = r(N, I, spread=spread)
    halves = r.rng.integers(-254, 255, (N, I)).astype(dtype) / 2  # with 127, scale 1: half are ties
    halves[:, 0] = 127
    for rows in (x, halves):
        same_bits(FAST[name].quantise_rows(rows), NUMPY.quantise_rows(rows))


@of_each_fast_backend
@of_each_dtype
@of_each_quantization
@always([{"heights": [300, 1, 70], "I": 120, "spread": 1.0, "equal": False, "seed": 15}])
@given(
    heights=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    I=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-7, 1.0, 1e20]),
    equal=st.booleans(),
    seed=SEEDS,
)
@quick(50)
def test_weights_are_quantised_to_the_bits_of_the_definition(
    name: str,
    dtype: Any,
    quantization: Any,
    heights: list[int],
    I: int,
    spread: float,
    equal: bool,
    seed: int,
) -> None:
    r, starts = Inputs(seed, dtype), (0, *itertools.accumulate(heights))
    w = r(starts[-1], I, spread=spread)
    w *= 10 ** r.rng.uniform(-8, 8, w.shape).astype(dtype)  # sums that lose bits in any order
    if equal:
        w[...] = w[0, 0]
    before = r.rng.integers(-1, 2, w.shape).astype(dtype)
    found, expected = (quantise(ops, w, starts, quantization, before) for ops in (FAST[name], NUMPY))
    same_bits(found, expected)
    q, beta, report = found
    for ops in (FAST[name], NUMPY):
        again = quantise(ops, w, starts, quantization, q)
        assert not again.report[:, 4].any()  # nothing flips the second time
        same_bits([again.q, again.beta, again.report[:, :4]], [q, beta, report[:, :4]])
    for x, (first, last) in enumerate(itertools.pairwise(starts)):
        now, then = q[first:last], before[first:last]
        values = [int((now == value).sum()) for value in (-1, 0, 1)]
        assert report[x].tolist() == [beta[first], *values, int((now != then).sum())]


@pytest.mark.parametrize("shape", [(-1, 1), (1, -1)], ids=["column", "row"])
@pytest.mark.parametrize(
    ("dtype", "quantization", "numbers"),
    [
        # Last the number that lifts the sum of the others off a tie.
        (np.float64, "bitnet_b158", [1, 0, 2.0**-53, 2.0**-110]),
        (np.float32, "bitnet_b158", [1, 2.0**-24, 2.0**-53, 2.0**-110]),
        # All cancel but the last two; the mean is larger than the last, or 0.
        (np.float64, "bitnet", [2.0**60, 1, -(2.0**60), -1, 2.0**-60, 2.0**-64]),
        (np.float32, "bitnet", [2.0**60, 1, 2.0**-60, -(2.0**60), -1, 2.0**-64]),
    ],
)
def test_the_mean_is_the_exact_sum_rounded_once(
    dtype: Any, quantization: Any, numbers: list[float], shape: tuple[int, int]
) -> None:
    # [D8]
    w = np.array(numbers, dtype).reshape(shape)
    results = [quantise(ops, w, (0, len(w)), quantization) for ops in BACKENDS.values()]
    for result in results[1:]:
        same_bits(result, results[0])


def wide(kind: str, dtype: Any, r: Inputs) -> Any:
    """Numbers whose float64 sum depends on their order, some hundreds."""
    if kind == "wide":
        return (r(17, 31) * 10 ** r.rng.uniform(-30, 30, (17, 31))).astype(dtype)
    if kind == "extremes":  # the largest, the smallest normal and the smallest number there is
        limits = np.finfo(dtype)
        large = limits.max / 1024  # a sum of float64's must stay finite
        numbers = np.array([large, limits.tiny, limits.smallest_subnormal, 1], dtype)
        return numbers[r.rng.integers(0, 4, (9, 23))] * r.rng.choice([-1, 1], (9, 23)).astype(dtype)
    if kind == "cancelling":
        half = (r(16, 30) * 10 ** r.rng.uniform(-30, 30, (16, 30))).astype(dtype)
        return np.concatenate([half, -half[::-1], r(1, 30, spread=1e-25)])
    if kind == "tiny":
        return r(9, 23, spread=float(np.finfo(dtype).tiny))
    return np.concatenate([r(80, 60), r(2, 60, spread=1e-20), np.zeros((1, 60), dtype)])  # narrow


@of_each_dtype
@of_each_quantization
@pytest.mark.parametrize("kind", ["wide", "extremes", "cancelling", "tiny", "narrow"])
def test_the_mean_is_exact_whatever_the_exponents(kind: str, quantization: Any, dtype: Any) -> None:
    # [D8]. Alone, and with neighbours that differ from it.
    r = Inputs(23, dtype)
    w = wide(kind, dtype, r)
    joined = np.concatenate([r(3, w.shape[1]), w, r(5, w.shape[1], spread=1e-9)])
    for numbers, starts in ((w, (0, len(w))), (joined, (0, 3, 3 + len(w), len(joined)))):
        expected = quantise(NUMPY, numbers, starts, quantization)
        for ops in FAST.values():
            same_bits(quantise(ops, numbers, starts, quantization), expected)


@of_the_device
def test_the_number_of_launches_does_not_grow_with_the_matrices() -> None:
    if CUDA_NAME == "cuda":
        pytest.skip("only emulated launches are counted")
    ops: Any = cuda_operations()
    w = ops.to_device(Inputs(24, np.float32)(80, 9))
    q, beta = ops.zeros((80, 9), np.float32), ops.zeros((80,), np.float32)
    launched = []
    for matrices in (1, 80):
        starts = tuple(range(0, 81, 80 // matrices))
        report = ops.zeros((matrices, 5), np.float64)
        for _ in range(2):  # the second time nothing is copied over
            cupy_on_cpu.emulation.clear()
            ops.quantise_weight(w, starts, quantization="bitnet", q_OI=q, beta_O=beta, report_X5=report)
        assert cupy_on_cpu.emulation.uploads == cupy_on_cpu.emulation.waits == 0
        launched.append(dict(cupy_on_cpu.emulation.launches))
    assert launched[0] == launched[1]


# ---- special promises ------------------------------------------------------------------------


@of_each_dtype
@given(N=st.integers(1, 9), I=st.integers(1, 70), spread=st.sampled_from([1e-7, 1.0, 1e20]), seed=SEEDS)
@quick(40)
def test_a_quantised_row_is_the_nearest_on_its_own_grid(
    dtype: Any, N: int, I: int, spread: float, seed: int
) -> None:
    x = Inputs(seed, dtype)(N, I, spread=spread)
    # 127/gamma, the product and gamma/127 are rounded: three halves of an eps, of at most 127.
    slack = 127 * 2 * np.finfo(dtype).eps
    for backend in BACKENDS.values():
        with unchanged(x):
            q, scale = backend.quantise_rows(x)
        steps = x.astype(float) / scale.astype(float)[:, None]
        assert (np.rint(q) == q).all()
        assert (np.abs(q - steps) <= 0.5 + slack).all()
        largest = np.abs(x).max(axis=1)
        same_bits(scale, np.maximum(largest, dtype(1e-5)) / dtype(127))
        assert (np.abs(q).max(axis=1)[largest >= dtype(1e-5)] == 127).all()


@of_each_dtype
@given(O=st.integers(1, 9), I=st.integers(1, 20), spread=st.sampled_from([1e-7, 1.0, 1e20]), seed=SEEDS)
@quick(40)
def test_a_quantised_weight_is_the_nearest_sign_or_trit(
    dtype: Any, O: int, I: int, spread: float, seed: int
) -> None:
    w, eps = Inputs(seed, dtype)(O, I, spread=spread), np.finfo(dtype).eps
    mean, magnitude = (math.fsum(part.ravel().tolist()) / w.size for part in (w, np.abs(w)))
    before = np.full_like(w, 9)
    for backend in BACKENDS.values():
        ternary = quantise(backend, w, (0, O), "bitnet_b158", before)
        np.testing.assert_allclose(ternary.beta, max(magnitude, 1e-5), rtol=eps)
        inside = np.clip(w / ternary.beta.astype(float)[:, None], -1, 1)
        assert set(ternary.q.ravel()) <= {-1, 0, 1}
        assert (np.abs(ternary.q - inside) <= 0.5 + 2 * eps).all()
        sign = quantise(backend, w, (0, O), "bitnet", before)
        same_bits(sign.beta, ternary.beta)
        assert set(sign.q.ravel()) <= {-1, 1}
        # A weight within the rounding of the mean may fall on either side of it.
        clear = np.abs(w - mean) > eps * abs(mean)
        assert (sign.q == np.where(w > mean, 1, -1))[clear].all()


@of_each_dtype
def test_halves_round_to_even_and_what_is_not_finite_shows(dtype: Any) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], [0] * 8, [np.nan] + [1] * 7], dtype)
    for ops in BACKENDS.values():
        q, scale = ops.quantise_rows(x)
        assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
        assert scale[0] == 1
        assert q[1].tolist() == [0] * 8
        assert scale[1] == dtype(1e-5) / dtype(127)
        assert np.isnan(scale[2])


@of_each_dtype
def test_rows_that_are_not_finite_are_quantised_as_defined(dtype: Any) -> None:
    x = np.ones((65, 9), dtype)
    for n, bad in enumerate([np.nan, np.inf, -np.inf] * 20):
        x[n, n % 9] = bad
    x[60, :2] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = NUMPY.quantise_rows(x)
    for ops in FAST.values():
        for actual, wanted in zip(ops.quantise_rows(x), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)  # NaN where NaN is, whatever its bits
    assert (~np.isfinite(expected[1])).sum() == 61


@of_the_device
@of_each_dtype
@pytest.mark.parametrize("I", [7, 1030])
def test_what_a_bit_linear_acts_as_has_the_bits_of_the_definition(dtype: Any, I: int) -> None:
    r = Inputs(25, dtype)
    x, stack = r(9, I), BitWeight(r.rng.integers(-1, 2, (3, 5, I)).astype(dtype), np.abs(r(3, 5)))
    for e in range(3):
        one = BitWeight(stack.w[e], stack.beta[e])
        same_bits(CUDA.straight_through(x, one), straight_through(x, one))  # type: ignore[attr-defined]
    _, w_hat = CUDA.straight_through(x, stack)  # type: ignore[attr-defined]
    same_bits(w_hat, stack.beta[..., None] * stack.w)


@of_each_dtype
@of_each_backend
def test_the_order_of_a_matrix_does_not_touch_its_scale(name: str, dtype: Any) -> None:
    r = Inputs(16, dtype)
    w = r(50, 40) * 10 ** r.rng.uniform(-8, 8, (50, 40)).astype(dtype)
    scales = set()
    for _ in range(20):
        scales.add(quantise(BACKENDS[name], w, (0, 50), "bitnet").beta[0].item())
        w = r.rng.permutation(w.ravel()).reshape(w.shape)
    assert len(scales) == 1


@of_each_dtype
@of_each_quantization
@of_each_backend
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_a_matrix_that_is_not_finite_shows_it_and_spares_its_neighbour(
    name: str, quantization: Any, dtype: Any, bad: list[float]
) -> None:
    w = Inputs(19, dtype)(8, 5)
    w.ravel()[1 : 1 + len(bad)] = bad
    found = quantise(BACKENDS[name], w, (0, 4, 8), quantization)
    assert np.isnan(found.beta[:4]).all()
    assert np.isfinite(found.beta[4:]).all()
    np.testing.assert_array_equal(found.report[:, 0].astype(dtype), found.beta[::4])


@of_each_dtype
@of_each_quantization
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf], [np.inf] * 20])
def test_a_matrix_that_is_not_finite_is_quantised_as_defined(
    quantization: Any, dtype: Any, bad: list[float]
) -> None:
    w = Inputs(20, dtype)(8, 5)
    w.ravel()[: len(bad)] = bad
    with np.errstate(invalid="ignore"):
        results = [quantise(ops, w, (0, 4, 8), quantization) for ops in BACKENDS.values()]
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(actual, expected)  # NaN where NaN is, whatever its bits


@of_each_dtype
@of_each_backend
def test_constant_and_tiny_matrices(name: str, dtype: Any) -> None:
    cases = [("bitnet_b158", 0.25, 1, 0.25), ("bitnet_b158", -0.25, -1, 0.25)]
    cases += [("bitnet", 0.25, -1, 0.25), ("bitnet_b158", 0.0, 0, 1e-5), ("bitnet", 0.0, -1, 1e-5)]
    cases += [("bitnet_b158", 4e-6, 0, 1e-5), ("bitnet_b158", 6e-6, 1, 1e-5)]
    for quantization, value, integer, scale in cases:
        found = quantise(BACKENDS[name], np.full((7, 5), value, dtype), (0, 7), quantization)
        assert set(found.q.ravel()) == {integer}
        assert set(found.beta) == {dtype(scale)}
