"""Packed products and quantisers: the definition's bits, on every instruction set there is."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.operations.numba_cpu import NumbaOperations
from mhmoe_np.operations.numba_cpu.instruction_set import VARIABLE, InstructionSet, available, choose
from mhmoe_np.operations.numba_cpu.packed import as_stack
from mhmoe_np.operations.numba_cpu.packed_product import PackedProduct, packed_product, padded_inputs
from mhmoe_np.operations.packing import FORMATS, PLACES, FormatName, PackedMatrices, pack
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight
from tests.operations.cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    NUMBA,
    NUMPY,
    SEEDS,
    Inputs,
    agree,
    always,
    copies,
    packed_weight,
    quick,
    same_bits,
    unchanged,
)

SETS = {name: NumbaOperations(instruction_set=name) for name in available()}
of_each_set = pytest.mark.parametrize("instruction_set", SETS)
of_each_format = pytest.mark.parametrize("format", FORMATS)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
VALUES = {"ternary-2bit": [-1, 0, 1], "ternary-base3": [-1, 0, 1], "sign-1bit": [-1, 1]}


def bit_weight(r: Inputs, format: FormatName, *shape: int) -> BitWeight:
    """Random integers of a format."""
    w = r.rng.choice(VALUES[format], shape).astype(r.dtype)
    return BitWeight(w, np.abs(r(*shape[:-1])))


# ---- products --------------------------------------------------------------------------------

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15]  # all tiles of every instruction set
EDGES = [63, 64, 65, 255, 256, 257]
# More than 2^22 multiply-adds, which run in parallel; those above are below that.
LARGE = [(1, 2100, 2050), (257, 130, 130), (300, 520, 40), (1030, 70, 65), (1100, 7, 600)]


def case(rows: int, outputs: int, inputs: int, *, bias: bool = True) -> dict[str, Any]:
    sizes = {"rows": rows, "outputs": outputs, "inputs": inputs}
    return {**sizes, "spread": 1.0, "bias": bias, "seed": 6}


@of_each_set
@of_each_format
@always([case(n, 150, 70) for n in ROWS])
@always([case(n, 33, 21) for n in EDGES])
@always([case(n, 1, 1, bias=bias) for n in (1, 2, 9) for bias in (True, False)])
@always([case(*size) for size in LARGE])
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e20]),
    bias=st.booleans(),
    seed=SEEDS,
)
@quick(30)
def test_a_packed_linear_map_has_the_bits_of_the_definition(
    instruction_set: InstructionSet,
    format: FormatName,
    rows: int,
    outputs: int,
    inputs: int,
    spread: float,
    bias: bool,
    seed: int,
) -> None:
    # [spec 5 packed weights], [spec 5 integer product]
    r = Inputs(seed, np.float32)
    w = bit_weight(r, format, outputs, inputs)
    packed = packed_weight(w, format)
    x, b = r(rows, inputs, spread=spread), r(outputs) if bias else None
    with unchanged(x, b, *w, packed.w.code, packed.beta):
        expected = NUMPY.linear(x, w, b)
        same_bits(SETS[instruction_set].linear(x, packed, b), expected)
        same_bits(NUMPY.linear(x, packed, b), expected)
        same_bits(NUMBA.linear(x, w, b), expected)
        same_bits(SETS[instruction_set].linear(x, w._replace(packed=packed.w), b), expected)


@of_each_dtype
@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 40])
def test_a_sum_of_nothing_is_a_positive_zero(dtype: Any, size: int) -> None:
    # Its products are all -0, of which integers know nothing.
    bits = BitWeight(np.zeros((size, size), dtype), np.ones(size, dtype))
    for rows in (1, size):
        x = np.full((rows, size), -1, dtype)
        for ops, w in itertools.product(BACKENDS.values(), (bits, packed_weight(bits, "ternary-2bit"))):
            same_bits(ops.linear(x, w, None), np.zeros((rows, size), dtype))


@of_each_format
def test_float64_has_the_bits_of_the_definition_too(format: FormatName) -> None:
    r = Inputs(9, np.float64)
    w, x = bit_weight(r, format, 37, 91), r(5, 91)
    same_bits(NUMBA.linear(x, packed_weight(w, format), None), NUMPY.linear(x, w, None))


@of_each_set
@of_each_format
@pytest.mark.parametrize("rows", [1, 13])
def test_extreme_rows_and_weights_have_the_bits_of_the_definition(
    instruction_set: InstructionSet, format: FormatName, rows: int
) -> None:
    inputs = 333
    kinds = {127: np.ones(inputs), -127: -np.ones(inputs), 0: np.zeros(inputs)}
    for integer, row in kinds.items():
        for size in (1.0, 1e-5, 3e38):
            x = np.tile(row * size, (rows, 1)).astype(np.float32)
            assert (NUMPY.quantise_rows(x)[0] == integer).all()
            for value in VALUES[format]:
                w = np.full((35, inputs), value, np.float32)
                bits = BitWeight(w, np.full(35, 1e-5, np.float32))
                y = SETS[instruction_set].linear(x, packed_weight(bits, format), None)
                same_bits(y, NUMPY.linear(x, bits, None))
                assert (np.sign(y) == np.sign(integer * value)).all()


def integer_product(packed: PackedMatrices, q_RI: Any, instruction_set: InstructionSet) -> Any:
    """The kernel alone, with all scales 1."""
    beta = np.ones((1, packed.outputs), np.float32)
    weight = as_stack(PackedWeight(packed, beta), instruction_set)
    rows, inputs = q_RI.shape
    padded = np.zeros((rows, padded_inputs(weight)), np.int8)
    padded[:, :inputs] = q_RI
    sums, scales = q_RI.sum(axis=1).astype(np.int32), np.ones(rows, np.float32)
    y = np.full((rows, packed.outputs), np.nan, np.float32)
    packed_product(PackedProduct(weight, 0, padded, scales, sums, y), 0, packed.code.shape[1])
    return y


@functools.cache
def extreme_products(format: FormatName, inputs: int) -> list[tuple[PackedMatrices, Any, Any]]:
    """Packed weights [150, inputs], int8 rows, and their exact product."""
    rng = np.random.default_rng(inputs)
    shape = (150, inputs)
    weights = [np.full(shape, value, np.int8) for value in VALUES[format]]
    weights.append(rng.choice(np.array(VALUES[format], np.int8), shape))
    mixed = rng.choice([-128, 127], (max(ROWS), inputs))
    # Integers within 2^24: 131,072 * 128 is 2^24 itself. A float64 sums them exactly.
    return [
        (pack(w[None], format), q, q.astype(np.float64) @ w.T.astype(np.float64))
        for w in weights
        for q in (np.full_like(mixed, 127), np.full_like(mixed, -128), mixed)
    ]


@of_each_set
@of_each_format
@pytest.mark.parametrize(
    ("inputs", "rows"), [(1, ROWS), (64, ROWS), (333, ROWS), (4096, ROWS), (131_072, [1, 11, 15])]
)
def test_extreme_integers_are_summed_exactly(
    instruction_set: InstructionSet, format: FormatName, inputs: int, rows: list[int]
) -> None:
    for packed, q, expected in extreme_products(format, inputs):
        for n in rows:
            y = integer_product(packed, q[:n], instruction_set)
            np.testing.assert_array_equal(y, expected[:n], err_msg=f"{n} rows")


@of_each_set
@of_each_format
@pytest.mark.parametrize("outputs", range(1, 151, 7))
def test_every_number_of_outputs_is_covered(
    instruction_set: InstructionSet, format: FormatName, outputs: int
) -> None:
    rng = np.random.default_rng(outputs)
    w = rng.choice(VALUES[format], (outputs, 45))
    q = rng.integers(-128, 128, (max(ROWS), 45))
    packed = pack(w[None], format)
    for n in ROWS:
        y = integer_product(packed, q[:n], instruction_set)
        np.testing.assert_array_equal(y, q[:n] @ w.T, err_msg=f"{n} rows")


@of_each_set
@of_each_format
def test_every_byte_is_taken_apart_to_the_values_packed(
    instruction_set: InstructionSet, format: FormatName
) -> None:
    # A row with a single number lets through the one weight that it meets.
    kind = FORMATS[format]
    combinations = np.array(list(itertools.product(VALUES[format], repeat=kind.depth)))
    w = np.empty((len(combinations), kind.depth, PLACES), int)
    for place in range(PLACES):  # four different bytes side by side
        w[:, :, place] = np.roll(combinations, 61 * place, axis=0)
    w = w.reshape(len(w), kind.group)
    packed, q = pack(w[None], format), np.eye(kind.group, dtype=int)
    np.testing.assert_array_equal(integer_product(packed, q, instruction_set), w.T)
    for row, column in zip(q, w.T, strict=True):
        np.testing.assert_array_equal(integer_product(packed, row[None], instruction_set)[0], column)


@of_each_set
@of_each_format
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(6, 40, 33), (300, 520, 40)])
def test_a_row_with_nan_or_infinity_spoils_itself_alone(
    instruction_set: InstructionSet, format: FormatName, rows: int, outputs: int, inputs: int
) -> None:
    r = Inputs(10, np.float32)
    w, x = bit_weight(r, format, outputs, inputs), r(rows, inputs)
    packed = packed_weight(w, format)
    clean = NUMPY.linear(x, w, None)
    x[1, 5], x[3, inputs - 1], x[4, 0] = np.nan, np.inf, -np.inf
    others = np.delete(np.arange(rows), [1, 3, 4])
    for ops, weight in ((SETS[instruction_set], packed), (NUMBA, w), (NUMPY, w), (NUMPY, packed)):
        with np.errstate(invalid="ignore"):
            y = ops.linear(x, weight, None)
        assert np.isnan(y[1]).all()
        assert not np.isfinite(y[[3, 4]]).any()
        same_bits(y[others], clean[others])


# ---- experts ---------------------------------------------------------------------------------

LOADS = st.sampled_from(["even", "one", "half"])
EXPERTS = [
    # One row an expert; half of the experts without any; all rows with one; some dropped.
    {"M": 1, "U": 5, "F": 7, "E": 3, "K": 3, "load": "even", "capacity": None, "seed": 11},
    {"M": 600, "U": 40, "F": 50, "E": 4, "K": 2, "load": "half", "capacity": None, "seed": 12},
    {"M": 700, "U": 70, "F": 90, "E": 2, "K": 1, "load": "one", "capacity": None, "seed": 13},
    {"M": 600, "U": 40, "F": 70, "E": 3, "K": 3, "load": "even", "capacity": 257, "seed": 13},
]


@of_each_set
@of_each_format
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "sub-norm"])
@always(EXPERTS)
@given(
    M=st.integers(1, 30),
    U=st.integers(1, 40),
    F=st.integers(1, 40),
    E=st.integers(1, 6),
    K=st.integers(1, 6),
    load=LOADS,
    capacity=st.sampled_from([None, 3]),
    seed=SEEDS,
)
@quick(10)
def test_packed_experts_have_the_bits_of_fake_quantised_ones(
    instruction_set: InstructionSet,
    format: FormatName,
    activation: Any,
    normed: bool,
    M: int,
    U: int,
    F: int,
    E: int,
    K: int,
    load: str,
    capacity: int | None,
    seed: int,
) -> None:
    r, K = Inputs(seed, np.float32), min(K, E)
    stacks = bit_weight(r, format, E, 2 * F, U), bit_weight(r, format, E, U, F)
    packs = [packed_weight(stack, format) for stack in stacks]
    doubles = [stack._replace(packed=packed.w) for stack, packed in zip(stacks, packs, strict=True)]
    norm = r(E, F) if normed else None
    x, gate, expert = r(M, U), r(M, K), r.experts(M, E, K, load)
    sent = NUMPY.dispatch(expert, experts=E, capacity=capacity)
    for ops in (SETS[instruction_set], NUMPY):
        with unchanged(x, gate, sent, *stacks, *(pack.w.code for pack in packs)):
            expected = ops.expert_ffn(x, gate, sent, *stacks, norm, activation=activation, eps=1e-5)
            actual = ops.expert_ffn(x, gate, sent, *packs, norm, activation=activation, eps=1e-5)
            double = ops.expert_ffn(x, gate, sent, *doubles, norm, activation=activation, eps=1e-5)
        same_bits(actual, expected)
        same_bits(double, expected)


# ---- quantisers ------------------------------------------------------------------------------


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
    dtype: Any, N: int, I: int, spread: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    x = r(N, I, spread=spread)
    halves = r.rng.integers(-254, 255, (N, I)).astype(dtype) / 2  # with 127, scale 1: half are ties
    halves[:, 0] = 127
    for rows in (x, halves):
        same_bits(NUMBA.quantise_rows(rows), NUMPY.quantise_rows(rows))


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
    for actual, wanted in zip(NUMBA.quantise_rows(x), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)  # NaN where NaN is, whatever its bits
    assert (~np.isfinite(expected[1])).sum() == 61


def quantise(
    ops: Operations,
    w: Any,
    starts: tuple[int, ...],
    quantization: Any,
    q: Any,
    beta: Any,
    report: Any = None,
) -> None:
    """`quantise_weight` into q, beta and, where it is wanted, report."""
    report = np.empty((len(starts) - 1, 5)) if report is None else report
    ops.quantise_weight(w, starts, quantization=quantization, q_OI=q, beta_O=beta, report_X5=report)


@of_each_dtype
@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
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
    dtype: Any, quantization: Any, heights: list[int], I: int, spread: float, equal: bool, seed: int
) -> None:
    r = Inputs(seed, dtype)
    start = tuple(np.cumsum([0, *heights]).tolist())
    w = r(start[-1], I, spread=spread)
    w *= 10 ** r.rng.uniform(-8, 8, w.shape).astype(dtype)  # sums that lose bits in any order
    if equal:
        w[...] = w[0, 0]
    before = r.rng.integers(-1, 2, w.shape).astype(dtype)
    results = []
    for ops in BACKENDS.values():
        q, beta = before.copy(), np.zeros(len(w), dtype)
        report, again = np.full((2, len(heights), 5), np.nan)
        with unchanged(w):
            quantise(ops, w, start, quantization, q, beta, report)
        results.append([report, q.copy(), beta.copy()])
        quantise(ops, w, start, quantization, q, beta, again)
        assert not again[:, 4].any()  # nothing flips the second time
        same_bits([again[:, :4], q, beta], [report[:, :4], *results[-1][1:]])
    same_bits(results[0], results[1])
    report, q, beta = results[0]
    for x, (first, last) in enumerate(itertools.pairwise(start)):
        now, then = q[first:last], before[first:last]
        values = [int((now == value).sum()) for value in (-1, 0, 1)]
        assert report[x].tolist() == [beta[first], *values, int((now != then).sum())]


@of_each_dtype
@pytest.mark.parametrize("name", BACKENDS)
def test_the_order_of_a_matrix_does_not_touch_its_scale(name: str, dtype: Any) -> None:
    r, ops = Inputs(16, dtype), BACKENDS[name]
    w = r(50, 40) * 10 ** r.rng.uniform(-8, 8, (50, 40)).astype(dtype)
    scales = set()
    for _ in range(20):
        q, beta = np.zeros_like(w), np.zeros(len(w), dtype)
        quantise(ops, w, (0, 50), "bitnet", q, beta)
        scales.add(beta[0].item())
        w = r.rng.permutation(w.ravel()).reshape(w.shape)
    assert len(scales) == 1


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
    w = np.array(numbers, dtype).reshape(shape)
    results = []
    for ops in BACKENDS.values():
        q, beta = np.zeros_like(w), np.zeros(len(w), dtype)
        report = np.zeros((1, 5))
        quantise(ops, w, (0, len(w)), quantization, q, beta, report)
        results.append([report, q, beta])
    same_bits(results[1], results[0])


@of_each_dtype
@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_a_matrix_that_is_not_finite_shows_it_and_spares_its_neighbour(
    name: str, quantization: Any, dtype: Any, bad: list[float]
) -> None:
    w = Inputs(19, dtype)(8, 5)
    w.ravel()[1 : 1 + len(bad)] = bad
    q, beta = np.zeros_like(w), np.zeros(8, dtype)
    report = np.zeros((2, 5))
    quantise(BACKENDS[name], w, (0, 4, 8), quantization, q, beta, report)
    same_bits(report[:, 0].astype(dtype), beta[::4])
    assert np.isnan(beta[:4]).all()
    assert np.isfinite(beta[4:]).all()


@of_each_dtype
@pytest.mark.parametrize("name", BACKENDS)
def test_constant_and_tiny_matrices(name: str, dtype: Any) -> None:
    cases = [("bitnet_b158", 0.25, 1, 0.25), ("bitnet_b158", -0.25, -1, 0.25)]
    cases += [("bitnet", 0.25, -1, 0.25), ("bitnet_b158", 0.0, 0, 1e-5), ("bitnet", 0.0, -1, 1e-5)]
    cases += [("bitnet_b158", 4e-6, 0, 1e-5), ("bitnet_b158", 6e-6, 1, 1e-5)]
    for quantization, value, integer, scale in cases:
        w = np.full((7, 5), value, dtype)
        q, beta = np.zeros_like(w), np.zeros(7, dtype)
        quantise(BACKENDS[name], w, (0, 7), quantization, q, beta)
        assert set(q.ravel()) == {integer}
        assert set(beta) == {dtype(scale)}


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_the_linear_backward_is_straight_through(name: str) -> None:
    # [B1 section 2.2], [spec 5 straight-through]
    r = Inputs(17, np.float64)
    w = bit_weight(r, "ternary-2bit", 9, 14)
    x, dy, dw, db = r(11, 14), r(11, 9), r(9, 14), r(9)
    before = copies([dw, db])
    dx = BACKENDS[name].linear_backward(dy, x, w, dw, db)
    q, scale = NUMPY.quantise_rows(x)
    agree(dx, dy @ (w.beta[:, None] * w.w))
    agree(dw, before[0] + dy.T @ (q * scale[:, None]))
    agree(db, before[1] + dy.sum(axis=0))


# More than 2^19 multiply-adds run in tiles; more than 64 rows are quantised in blocks.
TILED = [(63, 7, 5), (64, 7, 5), (65, 7, 5), (257, 45, 47), (33, 41, 513), (1025, 9, 63)]


@of_each_dtype
@always([{"rows": n, "inputs": i, "outputs": o, "bias": True, "seed": 19} for n, i, o in TILED])
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 19),
    outputs=st.integers(1, 19),
    bias=st.booleans(),
    seed=SEEDS,
)
@quick(20)
def test_the_linear_backwards_agree(
    dtype: Any, rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    r = Inputs(seed, dtype)
    w = bit_weight(r, "ternary-2bit", outputs, inputs)
    x, dy = r(rows, inputs), r(rows, outputs)
    expected = [r(outputs, inputs), r(outputs) if bias else None]
    actual = copies(expected)
    with unchanged(x, dy, *w):
        dx = NUMPY.linear_backward(dy, x, w, *expected)
        agree(NUMBA.linear_backward(dy, x, w, *actual), dx, unit=outputs**0.5)
    agree(actual, expected, unit=rows**0.5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "sub-norm"])
@always([{"M": 300, "U": 29, "F": 41, "E": 3, "K": 2, "load": "one", "capacity": 257, "seed": 20}])
@given(
    M=st.integers(1, 40),
    U=st.integers(1, 19),
    F=st.integers(1, 19),
    E=st.integers(1, 5),
    K=st.integers(1, 3),
    load=LOADS,
    capacity=st.sampled_from([None, 3]),
    seed=SEEDS,
)
@quick(15)
def test_the_experts_and_their_backwards_agree(
    activation: Any,
    normed: bool,
    M: int,
    U: int,
    F: int,
    E: int,
    K: int,
    load: str,
    capacity: int | None,
    seed: int,
) -> None:
    # float64: last bits that differ do not reach the next rounding of a quantiser.
    r, K = Inputs(seed, np.float64), min(K, E)
    stacks = bit_weight(r, "ternary-2bit", E, 2 * F, U), bit_weight(r, "sign-1bit", E, U, F)
    norm = r(E, F) if normed else None
    x, gate, dy = r(M, U), r(M, K), r(M, U)
    sent = NUMPY.dispatch(r.experts(M, E, K, load), experts=E, capacity=capacity)
    start = [r(E, 2 * F, U), r(E, U, F), r(E, F) if normed else None]
    results = []
    for ops in BACKENDS.values():
        dw = copies(start)
        given = (x, gate, sent, *stacks, norm)
        with unchanged(dy, *given):
            y, cache = ops.expert_ffn(*given, activation=activation, eps=1e-5)
            gradients = ops.expert_ffn_backward(dy, *given, cache, *dw, activation=activation)
        results.append([y, *gradients, *dw])
    unit = max(np.abs(array).max(initial=1) for array in results[0] if array is not None)
    agree(results[1], results[0], unit=unit * (M * K) ** 0.5)


@pytest.mark.parametrize("name", BACKENDS)
def test_packed_weights_have_no_backward(name: str) -> None:
    r, ops = Inputs(18, np.float32), BACKENDS[name]
    w = packed_weight(bit_weight(r, "sign-1bit", 4, 6), "sign-1bit")
    with pytest.raises(TypeError, match="packed"):
        ops.linear_backward(r(3, 4), r(3, 6), w, r(4, 6), None)
    stacks = [
        packed_weight(bit_weight(r, "sign-1bit", 2, *shape), "sign-1bit") for shape in ((8, 6), (6, 4))
    ]
    sent = ops.dispatch(np.array([[0], [1], [1]]), experts=2, capacity=None)
    given = (r(3, 6), r(3, 1), sent, *stacks, None)
    _, cache = ops.expert_ffn(*given, activation="silu", eps=1e-5)
    with pytest.raises(TypeError, match="packed"):
        ops.expert_ffn_backward(r(3, 6), *given, cache, r(2, 8, 6), r(2, 6, 4), None, activation="silu")


# ---- choosing an instruction set -------------------------------------------------------------


@of_each_set
def test_the_environment_names_an_instruction_set(
    instruction_set: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, instruction_set)
    assert choose() == instruction_set


def test_without_a_name_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose() == available()[0]
    monkeypatch.setenv(VARIABLE, "")
    assert choose() == available()[0]


def test_one_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(UserError, match=rf"{VARIABLE}=avx1024.*{', '.join(available())}"):
        choose()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 feature names")
@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", ["portable"]),
        ("+avx2,+fma", ["avx2", "portable"]),
        ("+avx2,+avx512f,+avx512bw", ["avx2", "portable"]),
        ("+avx2,+avxvnni,-avx512vnni", ["avxvnni", "avx2", "portable"]),
        ("+avx2,+avx512f,+avx512bw,+avx512vnni", ["avx512vnni", "avx2", "portable"]),
    ],
)
def test_what_numba_compiles_for_decides(features: str, expected: list[str]) -> None:
    code = "from mhmoe_np.operations.numba_cpu.instruction_set import available; print(*available())"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == expected
