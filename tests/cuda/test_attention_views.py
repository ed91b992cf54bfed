"""The cuda backend's attention and memory of the device: views, a cache, numbers that stay there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.cuda.backend import cuda_operations, on_the_device
from tests.cuda.emulator import cupy_on_cpu
from tests.operations.cases import NUMPY, Inputs, agree, heads, of_each_dtype, same_bits
from tests.operations.test_attention import Sizes

OPS = cuda_operations()
pytestmark = on_the_device


def on_device(*arrays: Any) -> list[Any]:
    return [OPS.to_device(array) for array in arrays]


def number(value: int) -> Any:
    return OPS.to_device(np.array([value]))


def cached(q: Any, k: Any, v: Any, kv: Any, filled: int) -> tuple[Any, Any]:
    """What attention and the cache become by the definitions."""
    T, G = q.shape[1], k.shape[2]
    kv = kv.copy()
    kv[:, filled : filled + T, :G], kv[:, filled : filled + T, G:] = k, v
    seen = kv[:, : filled + T]
    return NUMPY.attention(q, seen[:, :, :G], seen[:, :, G:])[0], kv


def attend_with_cache(qkv: Any, A: int, G: int, kv: Any, filled: int) -> tuple[Any, Any]:
    """By the backend: q, k and v are views of one array."""
    qkv_device, kv_device = on_device(qkv, kv)
    out = OPS.attention_with_cache(*heads(qkv_device, A, G), kv_device, number(filled))
    return OPS.to_host(out), OPS.to_host(kv_device)


# C = 8 may be read in vectors of 16 bytes, 6 not in float32 and 5 in neither.
@of_each_dtype
@pytest.mark.parametrize("C", [5, 6, 8])
def test_attention_and_its_backward_take_views_as_they_lie(dtype: Any, C: int) -> None:
    r, (B, T, A, G) = Inputs(40, dtype), (2, 70, 4, 2)
    qkv, dout, dqkv = r(B, T, A + 2 * G, C), r(B, T, A, C), r(B, T, A + 2 * G, C)
    q, k, v = heads(qkv, A, G)
    qkv_device, dout_device, dqkv_device = on_device(qkv, dout, dqkv)
    out, lse = OPS.attention(*heads(qkv_device, A, G))
    sizes = Sizes(q, k, v)
    expected_out, expected_lse = NUMPY.attention(q, k, v)
    agree((OPS.to_host(out), OPS.to_host(lse)), (expected_out, expected_lse), *sizes.forward())
    OPS.attention_backward(dout_device, *heads(qkv_device, A, G), out, lse, *heads(dqkv_device, A, G))
    NUMPY.attention_backward(dout, q, k, v, expected_out, expected_lse, *heads(dqkv, A, G))
    actual = OPS.to_host(dqkv_device)
    agree(heads(actual, A, G), heads(dqkv, A, G), *sizes.backward(dout, expected_out))
    same_bits(OPS.to_host(qkv_device), qkv)


@of_each_dtype
@pytest.mark.parametrize("first", [None, 0, 3])
def test_rotation_starts_at_a_row_that_the_device_knows(dtype: Any, first: int | None) -> None:
    r = Inputs(41, dtype)
    whole, cos, sin = r(2, 5, 4, 6), r(9, 3), r(9, 3)
    x_device, cos_device, sin_device = on_device(whole, cos, sin)
    first_1 = None if first is None else number(first)
    OPS.rotate_in_place(x_device[:, :, 1:3], cos_device, sin_device, first_1)
    start = first or 0
    a, b = whole[:, :, 1:3, :3].copy(), whole[:, :, 1:3, 3:].copy()
    c, s = cos[start : start + 5, None], sin[start : start + 5, None]
    whole[:, :, 1:3, :3], whole[:, :, 1:3, 3:] = a * c - b * s, b * c + a * s
    same_bits(OPS.to_host(x_device), whole)


@of_each_dtype
@pytest.mark.parametrize(("A", "G", "C"), [(4, 2, 6), (3, 3, 5), (20, 1, 8), (2, 1, 33)])
@pytest.mark.parametrize(
    ("T", "filled"), [(1, 0), (1, 1), (1, 127), (1, 128), (1, 299), (2, 0), (7, 60), (70, 3)]
)
def test_attention_with_a_cache_is_attention_to_all_that_is_filled(
    dtype: Any, A: int, G: int, C: int, T: int, filled: int
) -> None:
    # A group of 20 heads is more than the 16 of a block; 300 positions are three blocks.
    r, B, Y = Inputs(42, dtype), 2, 300
    qkv, kv = r(B, T, A + 2 * G, C), r(B, Y, 2 * G, C)
    kv[:, filled:] = math.nan  # of what is not filled nothing may be read
    q, k, v = heads(qkv, A, G)
    expected, expected_kv = cached(q, k, v, kv, filled)
    out, actual_kv = attend_with_cache(qkv, A, G, kv, filled)
    same_bits(actual_kv, expected_kv)
    seen = expected_kv[:, : filled + T]
    agree(out, expected, Sizes(q, seen[:, :, :G], seen[:, :, G:]).forward()[0])


@of_each_dtype
@pytest.mark.parametrize("T", [1, 2])
def test_the_room_of_a_cache_changes_no_bit(dtype: Any, T: int) -> None:
    r = Inputs(43, dtype)
    qkv, kv = r(1, T, 4, 6), r(1, 300, 2, 6)
    out, _ = attend_with_cache(qkv, 2, 1, kv, 140)
    smaller, _ = attend_with_cache(qkv, 2, 1, kv[:, :150], 140)
    same_bits(smaller, out)


@of_each_dtype
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("position", [0, 100, 129, 140])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cached_number_that_is_not_finite_shows(
    dtype: Any, T: int, position: int, bad: float
) -> None:
    r, (A, G, C, filled) = Inputs(44, dtype), (2, 1, 6, 140)
    qkv, kv = r(1, T, A + 2 * G, C), r(1, 150, 2 * G, C)
    for head in (0, 1):  # a key, a value
        poisoned, new = kv.copy(), qkv.copy()
        if position < filled:
            poisoned[0, position, head, 2] = bad
        else:
            new[0, 0, A + head, 2] = bad
        with np.errstate(all="ignore"):
            expected, _ = cached(*heads(new, A, G), poisoned, filled)
        out, _ = attend_with_cache(new, A, G, poisoned, filled)
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))


@of_each_dtype
def test_where_all_scores_are_minus_infinity_the_mean_is_nan(dtype: Any) -> None:
    r = Inputs(45, dtype)
    qkv, kv = abs(r(1, 1, 4, 6)), abs(r(1, 200, 2, 6))
    qkv[:, :, 2, 0] = kv[:, :, 0, 0] = -math.inf
    out, _ = attend_with_cache(qkv, 2, 1, kv, 150)
    assert np.isnan(out).all()
    keys, values = on_device(kv[:, :, :1], kv[:, :, 1:])
    out, lse = OPS.attention(OPS.to_device(qkv[:, :, :2]), keys, values)
    assert np.isnan(OPS.to_host(out)).all()
    assert np.isnan(OPS.to_host(lse)).all()
    kv[0, 130, 0, 0] = 1  # the one score that is finite has all the weight
    out, _ = attend_with_cache(qkv, 2, 1, kv, 150)
    np.testing.assert_array_equal(out, np.repeat(kv[:, 130:131, 1:], 2, axis=2))


@of_each_dtype
def test_nothing_waits_and_launches_do_not_depend_on_what_is_filled(dtype: Any) -> None:
    r = Inputs(46, dtype)
    qkv, kv, filled = *on_device(r(1, 1, 4, 6), r(1, 300, 2, 6)), [number(n) for n in (0, 290)]
    counts = []
    for filled_1 in filled:
        cupy_on_cpu.emulation.clear()
        OPS.attention_with_cache(*heads(qkv, 2, 1), kv, filled_1)
        assert cupy_on_cpu.emulation.waits == 0
        counts.append(dict(cupy_on_cpu.emulation.launches))
    assert counts[0] == counts[1]


@of_each_dtype
def test_no_sequences_are_no_work(dtype: Any) -> None:
    q, k, v = (OPS.empty((0, 3, heads, 4), dtype) for heads in (2, 1, 1))
    out, lse = OPS.attention(q, k, v)
    assert (out.shape, lse.shape) == ((0, 3, 2, 4), (0, 2, 3))
    OPS.attention_backward(out, q, k, v, out, lse, q, k, v)
    assert OPS.attention_with_cache(q, k, v, OPS.empty((0, 5, 2, 4), dtype), number(1)).shape == q.shape


def test_a_head_that_is_too_wide_is_refused() -> None:
    q = OPS.to_device(np.zeros((1, 1, 1, 257)))
    with pytest.raises(ValueError, match="257"):
        OPS.attention(q, q, q)
