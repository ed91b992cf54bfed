"""Linear maps of floats and of BitNet's integers, and the embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from mhmoe_np.operations.table import BitWeight
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
    copies,
    is_the_derivative,
    near,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    packed_weight,
    quick,
    same_bits,
    unchanged,
)

# ---- the definition --------------------------------------------------------------------------


@given(N=TINY, I=TINY, O=TINY, bias=st.booleans(), seed=SEEDS)
@quick(40)
def test_linear_sums_each_row_of_inputs_times_each_row_of_weights(
    N: int, I: int, O: int, bias: bool, seed: int
) -> None:
    # [spec 1 x @ W.T]
    r = Inputs(seed, float)
    x, w, b = r(N, I), r(O, I), r(O) if bias else None
    near(NUMPY.linear(x, w, b), dumb.linear(x, w, b))


@given(N=TINY, I=TINY, O=TINY, seed=SEEDS)
@quick(60)
def test_bit_linear_multiplies_integers(N: int, I: int, O: int, seed: int) -> None:
    # [B1 eq. 11], [spec 5 BitLinear], [spec 5 integer product]
    r = Inputs(seed, float)
    w = BitWeight(r.rng.integers(-1, 2, (O, I)).astype(float), np.abs(r(O)))
    x = r(N, I)
    expected = dumb.bit_linear(x.tolist(), w.w.tolist(), w.beta.tolist())
    np.testing.assert_array_equal(NUMPY.linear(x, w, None), expected)
    np.testing.assert_array_equal(NUMPY.linear(x, packed_weight(w, "ternary-base3"), None), expected)


@given(N=TINY, V=st.integers(1, 3), D=TINY, seed=SEEDS)
@quick(40)
def test_embedding_backward_adds_every_row_of_a_repeated_id(N: int, V: int, D: int, seed: int) -> None:
    # [spec 1 embed_tokens]
    r = Inputs(seed, float)
    dx, ids, dw = r(N, D), r.rng.integers(0, V, N), r(V, D)
    expected = dumb.embedding_backward(dx, ids, dw)
    NUMPY.embedding_backward(dx, ids, dw)
    near(dw, expected)


# ---- one backend and the other ---------------------------------------------------------------

# More than 2^19 multiply-adds run in tiles: of 256 rows, 512 from 2048 rows on, and of 512 columns
# below 1024 rows; a weight's gradient in strips of at least 128 outputs.
TILED = [
    *({"rows": n, "inputs": 45, "outputs": 47} for n in (255, 256, 257)),
    *({"rows": 33, "inputs": 41, "outputs": n} for n in (511, 512, 513)),
    *({"rows": 33, "inputs": n, "outputs": 41} for n in (511, 512, 513)),
    *({"rows": n, "inputs": 9, "outputs": 63} for n in (1023, 1024, 1025)),
    *({"rows": n, "inputs": 9, "outputs": 31} for n in (2047, 2048, 2049)),
    *({"rows": 257, "inputs": 37, "outputs": n} for n in (127, 128, 129, 1025)),
]


def backward_sizes(dy: Any, x: Any, w: Any, dw: Any, db: Any) -> tuple[Any, Any, Any]:
    """What is added up in dx, dw and db; x and w are what they act as, dw and db as they were."""
    dy, x, w = np.abs(dy), np.abs(x), np.abs(w)
    return dy @ w, dy.T @ x + np.abs(dw), None if db is None else dy.sum(axis=0) + np.abs(db)


@of_each_fast_backend
@of_each_dtype
@always([case | {"bias": True, "seed": 3} for case in TILED])
@always([{"rows": n, "inputs": 1, "outputs": 1, "bias": False, "seed": 4} for n in EDGES])
@given(rows=LENGTHS, inputs=WIDTHS, outputs=WIDTHS, bias=st.booleans(), seed=SEEDS)
@quick(20)
def test_linear_agrees(
    dtype: Any, name: str, rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    r, ops = Inputs(seed, dtype), FAST[name]
    x, w, dy = r(rows, inputs), r(outputs, inputs), r(rows, outputs)
    b = r(outputs) if bias else None
    with unchanged(x, w, b, dy):
        size = np.abs(x) @ np.abs(w).T + (0 if b is None else np.abs(b))
        agree(ops.linear(x, w, b), NUMPY.linear(x, w, b), size)
        expected = [r(outputs, inputs), r(outputs) if bias else None]
        actual, sizes = copies(expected), backward_sizes(dy, x, w, *expected)
        dx = NUMPY.linear_backward(dy, x, w, *expected)
        actual_dx = ops.linear_backward(dy, x, w, *actual)
    agree([actual_dx, *actual], [dx, *expected], *sizes)


# More than 2^19 multiply-adds run in tiles; more than 64 rows are quantised in blocks.
BIT_TILED = [(63, 7, 5), (64, 7, 5), (65, 7, 5), (257, 45, 47), (33, 41, 513), (1025, 9, 63)]


@of_each_fast_backend
@of_each_dtype
@always([{"rows": n, "inputs": i, "outputs": o, "bias": True, "seed": 19} for n, i, o in BIT_TILED])
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 19),
    outputs=st.integers(1, 19),
    bias=st.booleans(),
    seed=SEEDS,
)
@quick(20)
def test_the_backwards_of_a_bit_linear_agree(
    dtype: Any, name: str, rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    r, ops = Inputs(seed, dtype), FAST[name]
    w = r.bits("ternary-2bit", outputs, inputs)
    x, dy = r(rows, inputs), r(rows, outputs)
    expected = [r(outputs, inputs), r(outputs) if bias else None]
    q, scale = NUMPY.quantise_rows(x)
    acting_x, acting_w = q * scale[:, None], w.w * w.beta[:, None]
    actual, sizes = copies(expected), backward_sizes(dy, acting_x, acting_w, *expected)
    with unchanged(x, dy, *w):
        dx = NUMPY.linear_backward(dy, x, w, *expected)
        actual_dx = ops.linear_backward(dy, x, w, *actual)
    agree([actual_dx, *actual], [dx, *expected], *sizes)


@of_each_fast_backend
@of_each_dtype
@given(N=LENGTHS, V=WIDTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_embedding_agrees(dtype: Any, name: str, N: int, V: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), FAST[name]
    ids, w, dx, expected = r.rng.integers(0, V, N), r(V, D), r(N, D), r(V, D)
    actual, size = expected.copy(), np.abs(expected)
    np.add.at(size, ids, np.abs(dx))
    with unchanged(ids, w, dx):
        np.testing.assert_array_equal(ops.embedding(ids, w), NUMPY.embedding(ids, w))
        NUMPY.embedding_backward(dx, ids, expected)
        ops.embedding_backward(dx, ids, actual)
    agree(actual, expected, size)


@of_each_backend
@of_each_dtype
@always([{"N": N, "D": 13, "seed": 6} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_a_gradient_can_be_added_to_another(dtype: Any, name: str, N: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), BACKENDS[name]
    x, w, dy, around, dw = r(N, D), r(D, D), r(N, D), r(N, D), r(D, D)
    with unchanged(x, w, dy):
        dx, onto = ops.linear_backward(dy, x, w, dw, None), around.copy()
        assert ops.linear_backward(dy, x, w, dw, None, onto_NI=onto) is onto
    agree(onto, around + dx, np.abs(dy) @ np.abs(w) + np.abs(around))


@of_each_fast_backend
@of_each_dtype
@pytest.mark.parametrize("rows", [1, 256, 257, 511, 65_536, 65_537])
def test_a_bias_receives_the_gradients_of_any_number_of_rows(name: str, dtype: Any, rows: int) -> None:
    r = Inputs(21, dtype)
    x, w, dy, dw, db = r(rows, 1), r(3, 1), r(rows, 3), r(3, 1), r(3)
    expected, size = db.astype(float) + dy.sum(axis=0, dtype=float), np.abs(dy).sum(axis=0) + np.abs(db)
    FAST[name].linear_backward(dy, x, w, dw, db)
    agree(db, expected.astype(dtype), size)


# ---- gradients -------------------------------------------------------------------------------


@of_each_backend
@pytest.mark.parametrize("bias", [True, False])
def test_linear_backward_is_the_derivative(name: str, bias: bool) -> None:
    # [spec 1 x @ W.T]
    rng = np.random.default_rng(20)
    is_the_derivative(operation_checks.linear(BACKENDS[name], rng, outputs=3, bias=bias))


@of_each_backend
def test_embedding_backward_is_the_derivative(name: str) -> None:
    is_the_derivative(operation_checks.embedding(BACKENDS[name], np.random.default_rng(21)))


@of_each_backend
def test_the_linear_backward_is_straight_through(name: str) -> None:
    # [B1 section 2.2], [spec 5 straight-through]
    r = Inputs(17, np.float64)
    w = r.bits("ternary-2bit", 9, 14)
    x, dy, dw, db = r(11, 14), r(11, 9), r(9, 14), r(9)
    before = copies([dw, db])
    dx = BACKENDS[name].linear_backward(dy, x, w, dw, db)
    q, scale = NUMPY.quantise_rows(x)
    acting_x, acting_w = q * scale[:, None], w.beta[:, None] * w.w
    expected = [dy @ acting_w, before[0] + dy.T @ acting_x, before[1] + dy.sum(axis=0)]
    agree([dx, dw, db], expected, *backward_sizes(dy, acting_x, acting_w, *before))


# ---- special promises ------------------------------------------------------------------------


@of_each_backend
@of_each_dtype
@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 40])
def test_a_sum_of_nothing_is_a_positive_zero(dtype: Any, name: str, size: int) -> None:
    # Its products are all -0, of which integers know nothing.
    bits = BitWeight(np.zeros((size, size), dtype), np.ones(size, dtype))
    for rows in (1, size):
        x = np.full((rows, size), -1, dtype)
        for w in (bits, packed_weight(bits, "ternary-2bit")):
            same_bits(BACKENDS[name].linear(x, w, None), np.zeros((rows, size), dtype))


@of_each_backend
@of_each_dtype
@given(N=TINY, I=WIDTHS, O=WIDTHS, seed=SEEDS)
@quick(10)
def test_a_bias_is_added_to_a_bit_linear_with_one_rounding(
    dtype: Any, name: str, N: int, I: int, O: int, seed: int
) -> None:
    r = Inputs(seed, dtype)
    bits, x, b = r.bits("ternary-2bit", O, I), r(N, I), r(O)
    y = NUMPY.linear(x, bits, None)
    for w in (bits, packed_weight(bits, "ternary-2bit")):
        same_bits(BACKENDS[name].linear(x, w, b), y + b)


@of_each_backend
def test_packed_weights_have_no_gradient(name: str) -> None:
    r = Inputs(22, np.float32)
    w = packed_weight(r.bits("ternary-2bit", 3, 4), "ternary-2bit")
    with pytest.raises(TypeError, match="packed weights have no gradient"):
        BACKENDS[name].linear_backward(r(5, 3), r(5, 4), w, r(3, 4), None)
