"""Packed products and quantisers: the definition's bits, on every instruction set there is."""

from __future__ import annotations

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
from mhmoe_np.operations.numba_cpu.packed import as_stack, packed_product, padded_inputs
from mhmoe_np.operations.table import BitWeight, PackedWeight
from mhmoe_np.packing import FORMATS, FormatName, pack
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

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 63, 64, 65]
LARGE = [(1, 2100, 2050), (257, 130, 130), (1030, 70, 65), (300, 520, 40)]


@of_each_set
@of_each_format
@always([{"rows": n, "outputs": 150, "inputs": 70, "seed": 6} for n in ROWS])
@always([{"rows": n, "outputs": 1, "inputs": 1, "seed": 7} for n in (1, 2, 9)])
@always([{"rows": n, "outputs": o, "inputs": i, "seed": 8} for n, o, i in LARGE])
@given(rows=st.integers(1, 40), outputs=st.integers(1, 150), inputs=st.integers(1, 300), seed=SEEDS)
@quick(30)
def test_a_packed_linear_map_has_the_bits_of_the_definition(
    instruction_set: InstructionSet,
    format: FormatName,
    rows: int,
    outputs: int,
    inputs: int,
    seed: int,
) -> None:
    r = Inputs(seed, np.float32)
    w = bit_weight(r, format, outputs, inputs)
    x, b = r(rows, inputs), r(outputs)
    expected = NUMPY.linear(x, w, b)
    same_bits(SETS[instruction_set].linear(x, packed_weight(w, format), b), expected)
    same_bits(NUMPY.linear(x, packed_weight(w, format), b), expected)
    same_bits(NUMBA.linear(x, w, b), expected)


@of_each_format
def test_float64_has_the_bits_of_the_definition_too(format: FormatName) -> None:
    r = Inputs(9, np.float64)
    w, x = bit_weight(r, format, 37, 91), r(5, 91)
    same_bits(NUMBA.linear(x, packed_weight(w, format), None), NUMPY.linear(x, w, None))


@of_each_set
@of_each_format
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
@pytest.mark.parametrize("inputs", [1, 64, 4096, 131_072])
def test_extreme_integers_are_summed_exactly(
    instruction_set: InstructionSet, format: FormatName, rows: int, inputs: int
) -> None:
    outputs = 150 if inputs < 4096 else 35
    rng = np.random.default_rng(inputs)
    ends = rng.choice([-128, 127], (rows, inputs))
    for w in (
        np.full((outputs, inputs), 1),
        np.full((outputs, inputs), -1),
        np.full((outputs, inputs), VALUES[format][len(VALUES[format]) // 2]),
        rng.choice(VALUES[format], (outputs, inputs)),
    ):
        weight = as_stack(
            PackedWeight(pack(w[None], format), np.ones((1, outputs), np.float32)), instruction_set
        )
        for q in (np.full_like(ends, 127), np.full_like(ends, -128), ends, np.zeros_like(ends)):
            padded = np.zeros((rows, padded_inputs(weight)), np.int8)
            padded[:, :inputs] = q
            y = np.empty((rows, outputs), np.float32)
            sums = q.sum(axis=1).astype(np.int32)
            ones = np.ones(rows, np.float32)
            packed_product(weight, 0, padded, ones, sums, y, 0, weight.code.shape[1])
            expected = q.astype(np.float64) @ w.T.astype(np.float64)  # integers, exact
            # All within 2^24, so a float32 holds each: 131,072 * 128 is 2^24 itself.
            np.testing.assert_array_equal(y, expected)


@of_each_set
def test_a_row_with_nan_or_infinity_spoils_itself_alone(instruction_set: InstructionSet) -> None:
    r = Inputs(10, np.float32)
    w, x = bit_weight(r, "ternary-2bit", 40, 33), r(6, 33)
    clean = SETS[instruction_set].linear(x, packed_weight(w, "ternary-2bit"), None)
    x[1, 5], x[3, 32], x[4, 0] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        y = SETS[instruction_set].linear(x, packed_weight(w, "ternary-2bit"), None)
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[[3, 4]]).any()
    same_bits(y[[0, 2, 5]], clean[[0, 2, 5]])


# ---- experts ---------------------------------------------------------------------------------

LOADS = st.sampled_from(["even", "one", "half"])
EXPERTS = [
    {"M": 1, "U": 5, "F": 7, "E": 3, "K": 3, "load": "even", "seed": 11},
    {"M": 600, "U": 40, "F": 50, "E": 4, "K": 2, "load": "half", "seed": 12},
    {"M": 700, "U": 70, "F": 90, "E": 2, "K": 1, "load": "one", "seed": 13},
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
    K=st.integers(1, 3),
    load=LOADS,
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
    seed: int,
) -> None:
    r, K = Inputs(seed, np.float32), min(K, E)
    stacks = bit_weight(r, format, E, 2 * F, U), bit_weight(r, format, E, U, F)
    packs = [packed_weight(stack, format) for stack in stacks]
    norm = r(E, F) if normed else None
    x, gate, expert = r(M, U), r(M, K), r.experts(M, E, K, load)
    for ops in (SETS[instruction_set], NUMPY):
        sent = ops.dispatch(expert, experts=E, capacity=None)
        expected, _ = ops.expert_ffn(x, gate, sent, *stacks, norm, activation=activation, eps=1e-5)
        actual, _ = ops.expert_ffn(x, gate, sent, *packs, norm, activation=activation, eps=1e-5)
        same_bits(actual, expected)


# ---- quantisers ------------------------------------------------------------------------------


@of_each_dtype
@always([{"N": n, "I": 33, "spread": 1.0, "seed": 14} for n in (63, 64, 65, 257)])
@given(
    N=st.integers(1, 20),
    I=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1e-40, 1e-6, 1.0, 1e30]),
    seed=SEEDS,
)
@quick(40)
def test_rows_are_quantised_to_the_bits_of_the_definition(
    dtype: Any, N: int, I: int, spread: float, seed: int
) -> None:
    x = Inputs(seed, dtype)(N, I, spread=spread)
    same_bits(NUMBA.quantise_rows(x), NUMPY.quantise_rows(x))


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
@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
@always([{"heights": [300, 1, 70], "I": 120, "spread": 1.0, "seed": 15}])
@given(
    heights=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    I=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-7, 1.0, 1e20]),
    seed=SEEDS,
)
@quick(30)
def test_weights_are_quantised_to_the_bits_of_the_definition(
    dtype: Any, quantization: Any, heights: list[int], I: int, spread: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    start = np.cumsum([0, *heights])
    w = r(start[-1], I, spread=spread)
    w *= 10 ** r.rng.uniform(-3, 3, w.shape).astype(dtype)  # sums that lose bits in any order
    before = r.rng.integers(-1, 2, w.shape).astype(dtype)
    results = []
    for ops in BACKENDS.values():
        q, beta = before.copy(), np.zeros(len(w), dtype)
        counts = ops.quantise_weight(w, start, quantization=quantization, q_OI=q, beta_O=beta)
        results.append([counts, q, beta])
    same_bits(results[0], results[1])
    assert results[0][0][:, :3].sum() == w.size


@of_each_dtype
@pytest.mark.parametrize("name", BACKENDS)
def test_the_order_of_a_matrix_does_not_touch_its_scale(name: str, dtype: Any) -> None:
    r, ops = Inputs(16, dtype), BACKENDS[name]
    w = r(50, 40) * 10 ** r.rng.uniform(-8, 8, (50, 40)).astype(dtype)
    scales = set()
    for _ in range(20):
        q, beta = np.zeros_like(w), np.zeros(len(w), dtype)
        ops.quantise_weight(w, np.array([0, 50]), quantization="bitnet", q_OI=q, beta_O=beta)
        scales.add(beta[0].item())
        w = r.rng.permutation(w.ravel()).reshape(w.shape)
    assert len(scales) == 1


@of_each_dtype
@pytest.mark.parametrize("name", BACKENDS)
def test_constant_and_tiny_matrices(name: str, dtype: Any) -> None:
    cases = [("bitnet_b158", 0.25, 1, 0.25), ("bitnet_b158", -0.25, -1, 0.25)]
    cases += [("bitnet", 0.25, -1, 0.25), ("bitnet_b158", 0.0, 0, 1e-5), ("bitnet", 0.0, -1, 1e-5)]
    cases += [("bitnet_b158", 4e-6, 0, 1e-5), ("bitnet_b158", 6e-6, 1, 1e-5)]
    for quantization, value, integer, scale in cases:
        w = np.full((7, 5), value, dtype)
        q, beta = np.zeros_like(w), np.zeros(7, dtype)
        BACKENDS[name].quantise_weight(
            w, np.array([0, 7]), quantization=quantization, q_OI=q, beta_O=beta
        )
        assert set(q.ravel()) == {integer}
        assert set(beta) == {dtype(scale)}


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_the_linear_backward_is_straight_through(name: str) -> None:
    r = Inputs(17, np.float64)
    w = bit_weight(r, "ternary-2bit", 9, 14)
    x, dy, dw, db = r(11, 14), r(11, 9), r(9, 14), r(9)
    before = copies([dw, db])
    dx = BACKENDS[name].linear_backward(dy, x, w, dw, db)
    q, scale = NUMPY.quantise_rows(x)
    agree(dx, dy @ (w.beta[:, None] * w.w))
    agree(dw, before[0] + dy.T @ (q * scale[:, None]))
    agree(db, before[1] + dy.sum(axis=0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "sub-norm"])
@given(
    M=st.integers(1, 40),
    U=st.integers(1, 19),
    F=st.integers(1, 19),
    E=st.integers(1, 5),
    K=st.integers(1, 3),
    load=LOADS,
    seed=SEEDS,
)
@quick(15)
def test_the_experts_backwards_agree(
    activation: Any, normed: bool, M: int, U: int, F: int, E: int, K: int, load: str, seed: int
) -> None:
    # float64: last bits that differ do not reach the next rounding of a quantiser.
    r, K = Inputs(seed, np.float64), min(K, E)
    stacks = bit_weight(r, "ternary-2bit", E, 2 * F, U), bit_weight(r, "sign-1bit", E, U, F)
    norm = r(E, F) if normed else None
    x, gate, dy = r(M, U), r(M, K), r(M, U)
    sent = NUMPY.dispatch(r.experts(M, E, K, load), experts=E, capacity=None)
    start = [r(E, 2 * F, U), r(E, U, F), r(E, F) if normed else None]
    results = []
    for ops in BACKENDS.values():
        dw = copies(start)
        given = (x, gate, sent, *stacks, norm)
        _, cache = ops.expert_ffn(*given, activation=activation, eps=1e-5)
        gradients = ops.expert_ffn_backward(dy, *given, cache, *dw, activation=activation)
        results.append([*gradients, *dw])
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


def test_one_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(UserError, match=r"avx1024.*portable"):
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
