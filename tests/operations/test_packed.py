"""Packed products: the definition's bits, on every instruction set and by every kernel there is."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.operations.numpy_ref.quantise import expert
from mhmoe_np.operations.packing import FORMATS, PLACES, FormatName, PackedMatrices, pack
from mhmoe_np.operations.table import BitWeight, PackedWeight
from tests.cuda.backend import cuda_operations
from tests.libraries import ABSENT
from tests.operations.cases import (
    ACTIVATIONS,
    BACKENDS,
    CUDA,
    CUDA_NAME,
    LOADS,
    NUMBA,
    NUMPY,
    SEEDS,
    VALUES,
    Inputs,
    always,
    of_each_backend,
    of_the_device,
    packed_weight,
    quick,
    same_bits,
    unchanged,
)

SETS: dict[str, Any] = {}  # none without Numba
if "numba" not in ABSENT:
    from mhmoe_np.operations.numba_cpu import NumbaOperations
    from mhmoe_np.operations.numba_cpu.instruction_set import (
        VARIABLE,
        InstructionSet,
        available,
        choose,
    )
    from mhmoe_np.operations.numba_cpu.packed import as_stack
    from mhmoe_np.operations.numba_cpu.packed_product import (
        PackedProduct,
        packed_product,
        padded_inputs,
    )

    SETS = {name: NumbaOperations(instruction_set=name) for name in available()}
of_each_set = pytest.mark.parametrize("instruction_set", SETS)
of_each_format = pytest.mark.parametrize("format", FORMATS)

# The cuda backend chooses a kernel by sizes; these names take it to one whatever the sizes are.
DEVICE: Any = cuda_operations()
TILINGS = {f"{CUDA_NAME}-{name}": name for name in ("ROW", "ROWS", "SMALL_TILES", "TILES")}
ON_GPU = [pytest.mark.gpu] if CUDA_NAME == "cuda" else []
PARAMETERS = [pytest.param(name, marks=ON_GPU) for name in TILINGS]
of_each_tiling = pytest.mark.parametrize("tiling", PARAMETERS)
of_each_grouped_tiling = pytest.mark.parametrize(
    "tiling", PARAMETERS[1:]
)  # a single row has no experts
of_each_engine = pytest.mark.parametrize("engine", [*SETS, *PARAMETERS])


@contextmanager
def only(tiling: str) -> Iterator[None]:
    """The cuda backend multiplies by this kernel, whatever the sizes are."""
    from mhmoe_np.operations.cuda import packed

    forced = getattr(packed, TILINGS[tiling])
    with mock.patch.object(packed, "tiling_for", return_value=forced):
        yield


def product(engine: str, x: Any, w: Any, b: Any) -> Any:
    """A linear map by this instruction set, or by this kernel."""
    if engine in SETS:
        return SETS[engine].linear(x, w, b)
    with only(engine):
        y = CUDA.bit_linear(x, w)  # type: ignore[attr-defined]
    return y if b is None else y + b


# ---- products --------------------------------------------------------------------------------

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15]  # all tiles of every instruction set
EDGES = [63, 64, 65, 255, 256, 257]
# More than 2^22 multiply-adds, which numba runs in parallel; those above are below that.
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
    w = r.bits(format, outputs, inputs)
    packed = packed_weight(w, format)
    x, b = r(rows, inputs, spread=spread), r(outputs) if bias else None
    with unchanged(x, b, *w, packed.w.code, packed.beta):
        expected = NUMPY.linear(x, w, b)
        same_bits(SETS[instruction_set].linear(x, packed, b), expected)
        same_bits(NUMPY.linear(x, packed, b), expected)
        same_bits(NUMBA.linear(x, w, b), expected)
        same_bits(SETS[instruction_set].linear(x, w._replace(packed=packed.w), b), expected)


def tiles(rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    return {"rows": rows, "outputs": outputs, "inputs": inputs, "spread": 1.0, "seed": 6}


@of_each_tiling
@of_each_format
@always([tiles(n, 33, 21) for n in (1, 8, 9, 33, 129)])
@always([tiles(2, 1, 1), tiles(7, 150, 330)])
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e20]),
    seed=SEEDS,
)
@quick(5)
def test_every_kernel_has_the_bits_of_the_definition(
    tiling: str, format: FormatName, rows: int, outputs: int, inputs: int, spread: float, seed: int
) -> None:
    # [spec 5 packed weights], [spec 5 integer product]
    r = Inputs(seed, np.float32)
    w, x = r.bits(format, outputs, inputs), r(rows, inputs, spread=spread)
    packed = packed_weight(w, format)
    with unchanged(x, *w, packed.w.code, packed.beta):
        expected = NUMPY.linear(x, w, None)
        same_bits(product(tiling, x, packed, None), expected)
        same_bits(product(tiling, x, w._replace(packed=packed.w), None), expected)


@of_the_device
@pytest.mark.parametrize("rows", [200, 1400])
def test_large_linear_maps_have_the_bits_of_the_definition_unforced(rows: int) -> None:
    r = Inputs(6, np.float32)
    w, x = r.bits("ternary-2bit", 1600, 18), r(rows, 18)
    same_bits(CUDA.bit_linear(x, w), NUMPY.linear(x, w, None))  # type: ignore[attr-defined]


@of_each_tiling
@pytest.mark.parametrize("format", ["ternary-2bit", "sign-1bit"])
@pytest.mark.parametrize("rows", [1, 40])
def test_weights_without_a_packed_form_have_the_same_bits(
    tiling: str, format: FormatName, rows: int
) -> None:
    for dtype in (np.float32, np.float64):
        r = Inputs(7, dtype)
        w, x = r.bits(format, 50, 67), r(rows, 67)
        same_bits(product(tiling, x, w, None), NUMPY.linear(x, w, None))


@of_each_engine
@of_each_format
def test_float64_has_the_bits_of_the_definition_too(engine: str, format: FormatName) -> None:
    r = Inputs(9, np.float64)
    w, x = r.bits(format, 37, 91), r(5, 91)
    same_bits(product(engine, x, packed_weight(w, format), None), NUMPY.linear(x, w, None))


@of_each_engine
@of_each_format
@pytest.mark.parametrize("rows", [1, 13])
def test_extreme_rows_and_weights_have_the_bits_of_the_definition(
    engine: str, format: FormatName, rows: int
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
                y = product(engine, x, packed_weight(bits, format), None)
                same_bits(y, NUMPY.linear(x, bits, None))
                assert (np.sign(y) == np.sign(integer * value)).all()


def integer_product(packed: PackedMatrices, q_RI: Any, engine: str) -> Any:
    """The kernel alone, with all scales 1."""
    beta = np.ones((1, packed.outputs), np.float32)
    if engine in TILINGS:
        return _integer_product_on_device(packed, q_RI, beta, engine)
    weight = as_stack(PackedWeight(packed, beta), cast(InstructionSet, engine))
    rows, inputs = q_RI.shape
    padded = np.zeros((rows, padded_inputs(weight)), np.int8)
    padded[:, :inputs] = q_RI
    sums, scales = q_RI.sum(axis=1).astype(np.int32), np.ones(rows, np.float32)
    y = np.full((rows, packed.outputs), np.nan, np.float32)
    packed_product(PackedProduct(weight, 0, padded, scales, sums, y), 0, packed.code.shape[1])
    return y


def _integer_product_on_device(packed: PackedMatrices, q_RI: Any, beta: Any, tiling: str) -> Any:
    """The same by a kernel of the cuda backend, which chooses the padding itself."""
    from mhmoe_np.operations.cuda.quantise import ByteRows

    rows, inputs = q_RI.shape
    weight = PackedWeight(DEVICE.packed_to_device(packed), DEVICE.to_device(beta))
    width = DEVICE.bytes_for(DEVICE.zeros((1, inputs), np.float32), packed).width
    padded = np.zeros((rows, width), np.int8)
    padded[:, :inputs] = q_RI
    parts = padded, np.ones(rows, np.float32), q_RI.sum(axis=1).astype(np.int32)
    with only(tiling):
        return DEVICE.to_host(DEVICE.product_of_bytes(ByteRows(*map(DEVICE.to_device, parts)), weight))


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
    _extreme_integers_are_summed_exactly(instruction_set, format, inputs, rows)


@of_each_tiling
@of_each_format
@pytest.mark.parametrize(("inputs", "rows"), [(1, [1, 15]), (333, [9]), (2048, [1])])
def test_extreme_integers_are_summed_exactly_on_the_device(
    tiling: str, format: FormatName, inputs: int, rows: list[int]
) -> None:
    _extreme_integers_are_summed_exactly(tiling, format, inputs, rows)


def _extreme_integers_are_summed_exactly(
    engine: str, format: FormatName, inputs: int, rows: list[int]
) -> None:
    for packed, q, expected in extreme_products(format, inputs):
        for n in rows:
            y = integer_product(packed, q[:n], engine)
            np.testing.assert_array_equal(y, expected[:n], err_msg=f"{n} rows")


@of_each_set
@of_each_format
@pytest.mark.parametrize("outputs", range(1, 151, 7))
def test_every_number_of_outputs_is_covered(
    instruction_set: InstructionSet, format: FormatName, outputs: int
) -> None:
    _every_number_of_rows_is_covered(instruction_set, format, outputs, ROWS)


@of_each_tiling
@of_each_format
@pytest.mark.parametrize("outputs", [1, 15, 17, 64, 66, 129])
def test_every_number_of_outputs_is_covered_on_the_device(
    tiling: str, format: FormatName, outputs: int
) -> None:
    _every_number_of_rows_is_covered(tiling, format, outputs, [1, 3, 8, 15])


def _every_number_of_rows_is_covered(
    engine: str, format: FormatName, outputs: int, rows: list[int]
) -> None:
    rng = np.random.default_rng(outputs)
    w = rng.choice(VALUES[format], (outputs, 45))
    q = rng.integers(-128, 128, (max(ROWS), 45))
    packed = pack(w[None], format)
    for n in rows:
        y = integer_product(packed, q[:n], engine)
        np.testing.assert_array_equal(y, q[:n] @ w.T, err_msg=f"{n} rows")


@of_each_engine
@of_each_format
def test_every_byte_is_taken_apart_to_the_values_packed(engine: str, format: FormatName) -> None:
    # A row with a single number lets through the one weight that it meets.
    kind = FORMATS[format]
    combinations = np.array(list(itertools.product(VALUES[format], repeat=kind.depth)))
    w = np.empty((len(combinations), kind.depth, PLACES), int)
    for place in range(PLACES):  # four different bytes side by side
        w[:, :, place] = np.roll(combinations, 61 * place, axis=0)
    w = w.reshape(len(w), kind.group)
    packed, q = pack(w[None], format), np.eye(kind.group, dtype=int)
    np.testing.assert_array_equal(integer_product(packed, q, engine), w.T)
    for row, column in zip(q, w.T, strict=True) if engine in SETS else ():
        np.testing.assert_array_equal(integer_product(packed, row[None], engine)[0], column)


@of_each_set
@of_each_format
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(6, 40, 33), (300, 520, 40)])
def test_a_row_with_nan_or_infinity_spoils_itself_alone(
    instruction_set: InstructionSet, format: FormatName, rows: int, outputs: int, inputs: int
) -> None:
    _a_row_spoils_itself_alone(instruction_set, format, rows, outputs, inputs)


@of_each_tiling
@of_each_format
def test_a_row_with_nan_or_infinity_spoils_itself_alone_on_the_device(
    tiling: str, format: FormatName
) -> None:
    _a_row_spoils_itself_alone(tiling, format, 33, 40, 33)


def _a_row_spoils_itself_alone(
    engine: str, format: FormatName, rows: int, outputs: int, inputs: int
) -> None:
    r = Inputs(10, np.float32)
    w, x = r.bits(format, outputs, inputs), r(rows, inputs)
    packed = packed_weight(w, format)
    clean = NUMPY.linear(x, w, None)
    x[1, 5], x[3, inputs - 1], x[4, 0] = np.nan, np.inf, -np.inf
    others = np.delete(np.arange(rows), [1, 3, 4])
    with np.errstate(invalid="ignore"):
        results = [product(engine, x, packed, None)]
        results += [ops.linear(x, w, None) for ops, w in ((NUMBA, w), (NUMPY, w), (NUMPY, packed))]
    for y in results:
        assert np.isnan(y[1]).all()
        assert not np.isfinite(y[[3, 4]]).any()
        same_bits(y[others], clean[others])


# ---- rows of several matrices ----------------------------------------------------------------

SEGMENTS = [
    # Rows of each expert: none, one, as many as a tile, one more, all with one, many experts.
    [3],
    [0, 1, 0, 33, 8, 0],
    [32, 9, 1, 129, 0],
    [1, 0, 2] * 12,
]


@of_each_grouped_tiling
@of_each_format
@pytest.mark.parametrize("segments", range(len(SEGMENTS)))
def test_each_row_meets_the_matrix_of_its_expert(
    tiling: str, format: FormatName, segments: int
) -> None:
    counts, beyond = SEGMENTS[segments], 5 * (segments % 2)  # rows that are of no expert
    r, start_Z = Inputs(21, np.float32), np.concatenate([[0], np.cumsum(counts)])
    E, R, M = len(counts), int(start_Z[-1]), 40
    w, x_MI, x_RI = r.bits(format, E, 50, 37), r(M, 37), r(R + beyond, 37)
    packed, source_R = packed_weight(w, format), r.rng.integers(-1, M, R + beyond)
    for x, source in ((x_RI, None), (x_MI, source_R)):
        gathered = (
            x if source is None else np.where(source[:, None] < 0, 0, x[source]).astype(np.float32)
        )
        expected = np.concatenate(
            [NUMPY.linear(gathered[start_Z[e] : start_Z[e + 1]], expert(w, e), None) for e in range(E)]
        )
        if source is not None:
            expected[source[:R] < 0] = 0
        for weight in (packed, w._replace(packed=packed.w)) if source is None else (w,):
            with only(tiling):
                y = CUDA.grouped_bit_linear(  # type: ignore[attr-defined]
                    x, start_Z, weight, rows=R + beyond, source_R=source
                )
            same_bits(y[:R], expected)


@of_the_device
def test_no_rows_are_no_work() -> None:
    w = packed_weight(Inputs(22, np.float32).bits("ternary-2bit", 2, 5, 7), "ternary-2bit")
    x, start_Z = np.empty((0, 7), np.float32), np.zeros(3, np.int64)
    assert CUDA.bit_linear(x, w._replace(w=w.w.matrix(0))).shape == (0, 5)  # type: ignore[attr-defined]
    y = CUDA.grouped_bit_linear(x, start_Z, w, rows=0)  # type: ignore[attr-defined]
    assert y.shape == (0, 5)


def test_launches_depend_on_sizes_alone() -> None:
    from mhmoe_np.operations.cuda.packed import ROW, ROWS, SMALL_TILES, TILES, tiling_for

    def chosen(rows: int, experts: int | None = None, *, tensor_cores: bool = True) -> Any:
        return tiling_for(rows, 4096, experts=experts, tensor_cores=tensor_cores)

    assert [chosen(n) for n in (1, 2, 32, 33, 200, 4096)] == [
        ROW,
        *[ROWS] * 2,
        *[SMALL_TILES] * 2,
        TILES,
    ]
    assert [chosen(n, 64) for n in (1, 256, 257, 64 * 95, 64 * 96)] == [
        *[ROWS] * 2,
        *[SMALL_TILES] * 2,
        TILES,
    ]
    assert chosen(4096, tensor_cores=False) == chosen(4096, 4, tensor_cores=False) == ROWS


# ---- experts ---------------------------------------------------------------------------------

EXPERTS = [
    # One row an expert; half of the experts without any; all rows with one; some dropped.
    {"M": 1, "U": 5, "F": 7, "E": 3, "K": 3, "load": "even", "capacity": None, "seed": 11},
    {"M": 600, "U": 40, "F": 50, "E": 4, "K": 2, "load": "half", "capacity": None, "seed": 12},
    {"M": 700, "U": 70, "F": 90, "E": 2, "K": 1, "load": "one", "capacity": None, "seed": 13},
    {"M": 600, "U": 40, "F": 70, "E": 3, "K": 3, "load": "even", "capacity": 257, "seed": 13},
]


# Their products are those of linear maps, which every set was asked for in every format above.
OWN_SET = next(iter(SETS), None)
OF_EXPERTS = [
    pytest.param(instruction_set, format, id=f"{format}-{instruction_set}")
    for instruction_set in SETS
    for format in FORMATS
    if instruction_set == OWN_SET or format == "ternary-2bit"
]


@pytest.mark.parametrize(("instruction_set", "format"), OF_EXPERTS)
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
    routed = r.routed(M, U, E, K, load, capacity)
    stacks = r.bits(format, E, 2 * F, U), r.bits(format, E, U, F)
    packs = [packed_weight(stack, format) for stack in stacks]
    doubles = [stack._replace(packed=packed.w) for stack, packed in zip(stacks, packs, strict=True)]
    norm = r(E, F) if normed else None
    for ops in (SETS[instruction_set], NUMPY):
        with unchanged(*routed, *stacks, *(pack.w.code for pack in packs)):
            expected, actual, double = (
                ops.expert_ffn(*routed, *weights, norm, activation=activation, eps=1e-5)
                for weights in (stacks, packs, doubles)
            )
        same_bits(actual, expected)
        same_bits(double, expected)


@of_each_backend
def test_packed_weights_have_no_backward(name: str) -> None:
    r, ops = Inputs(18, np.float32), BACKENDS[name]
    w = packed_weight(r.bits("sign-1bit", 4, 6), "sign-1bit")
    with pytest.raises(TypeError, match="packed"):
        ops.linear_backward(r(3, 4), r(3, 6), w, r(4, 6), None)
    stacks = [packed_weight(r.bits("sign-1bit", 2, *shape), "sign-1bit") for shape in ((8, 6), (6, 4))]
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
