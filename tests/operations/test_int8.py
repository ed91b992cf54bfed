"""Weights in 8-bit integers: what they round to, and products with the definition's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.operations.int8 import (
    BLOCK,
    LARGEST_WEIGHT,
    Int8Weight,
    empty_int8,
    from_int8,
    parts_of,
    quantise_blocks,
    to_int8,
)
from mhmoe_np.operations.numpy_ref.quantise import expert
from mhmoe_np.operations.table import Dispatch
from tests.cuda.backend import cuda_operations
from tests.libraries import ABSENT
from tests.operations.cases import NUMBA, NUMPY, SEEDS, Inputs, always, quick, same_bits, unchanged

SETS: dict[str, Any] = {}  # none without Numba
if "numba" not in ABSENT:
    from mhmoe_np.operations.numba_cpu import NumbaOperations
    from mhmoe_np.operations.numba_cpu.instruction_set import available

    SETS = {name: NumbaOperations(instruction_set=name) for name in available()}
of_each_set = pytest.mark.parametrize("instruction_set", SETS)
of_numba = pytest.mark.skipif(NUMBA is None, reason="of the numba backend")

# ---- the weights -----------------------------------------------------------------------------


def test_a_block_of_32_inputs_has_one_scale_and_halves_round_to_even() -> None:
    # [spec 5 8-bit weights]
    w = np.zeros((1, 2, 34), np.float32)
    w[0, 0, :5] = [127, -127, 0.5, 1.5, -2.5]  # the scale is 1
    w[0, 0, 32:] = [254, 63]  # a block of its own, the scale is 2; 63 / 2 = 31.5
    q, scale = parts_of(to_int8(w))
    assert q[0, 0, :5].tolist() == [127, -127, 0, 2, -2]
    assert q[0, 0, 32:].tolist() == [127, 32]
    assert scale[0].tolist() == [[1, 2], [0, 0]]
    assert not q[0, 0, 5:32].any()
    assert not q[0, 1].any()


def test_the_integer_is_of_the_scale_that_is_kept() -> None:
    # 1 / 127 = 0.00787402 lies between float16's 0.0078735 and 0.0078812: the former is nearer.
    w = np.full((1, 1, 32), 0.25, np.float32)
    w[0, 0, 0] = 1
    q, scale = parts_of(to_int8(w))
    assert scale[0, 0, 0] == np.float16(1 / 127)
    assert q[0, 0, 0] == 127  # 1 / scale = 127.008
    assert q[0, 0, 1] == 32  # 0.25 / scale = 31.752


def test_integers_lie_in_panels_of_16_outputs_and_groups_of_4_inputs() -> None:
    rng = np.random.default_rng(3)
    weight = to_int8(rng.standard_normal((2, 35, 70)).astype(np.float32))
    q, scale = parts_of(weight)
    assert weight.q.shape == (2, 3, 24, 64)  # 70 inputs are three blocks of 32
    assert weight.scale.shape == (2, 3, 3, 16)
    for e, o, i in ((0, 0, 0), (1, 17, 5), (0, 34, 69), (1, 15, 33)):
        assert weight.q[e, o // 16, i // 4, o % 16 * 4 + i % 4] == q[e, o, i]
        assert weight.scale[e, o // 16, i // 32, o % 16] == scale[e, o, i // 32]
    outside = weight.q.reshape(2, 3, 24, 16, 4)
    assert not outside[:, 2, :, 3:].any()  # outputs 35 ..
    assert not outside[:, :, 18:].any()  # inputs 72 ..
    assert not outside[:, :, 17, :, 2:].any()  # inputs 70, 71
    assert weight.q.ctypes.data % 64 == weight.scale.ctypes.data % 64 == 0


@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 100),
    spread=st.sampled_from([1e-4, 1.0, 1e5]),
    seed=SEEDS,
)
@quick(40)
def test_no_weight_is_further_than_half_a_scale_and_packing_again_changes_nothing(
    outputs: int, inputs: int, spread: float, seed: int
) -> None:
    # [spec 5 8-bit weights]
    w = Inputs(seed, np.float32)(2, outputs, inputs, spread=spread)
    weight = to_int8(w)
    floats = from_int8(weight)
    _, halves = parts_of(weight)
    scale = halves.astype(np.float64)
    allowed = scale / 2 * (1 + 1e-6) + np.where(scale < 2**-14, 127 * 2.0**-25, 0)
    off = np.abs(w - floats.astype(np.float64))
    assert (off <= np.repeat(allowed, BLOCK, axis=2)[:, :, :inputs]).all()
    if scale.min() >= 2**-14:
        again = to_int8(floats)
        same_bits([again.q, again.scale], [weight.q, weight.scale])


def test_what_float16_has_no_scale_for_is_refused_or_zero() -> None:
    w = np.full((1, 1, 40), LARGEST_WEIGHT, np.float32)
    assert (from_int8(to_int8(w)) == w).all()
    for bad in (LARGEST_WEIGHT * 1.001, np.nan, -np.inf):
        w[0, 0, 39] = bad
        with pytest.raises(ValueError, match="not finite or beyond"):
            to_int8(w)
    assert not from_int8(to_int8(np.full((1, 3, 40), 1e-9, np.float32))).any()


# ---- products --------------------------------------------------------------------------------


def test_activations_are_quantised_by_the_same_blocks() -> None:
    # [spec 5 8-bit weights]
    x = np.zeros((1, 33), np.float32)
    x[0, :4] = [-254, 1, 3, -5]
    x[0, 32] = 1e-3
    q, scale = quantise_blocks(x)
    assert q.shape == (1, 2, 32)
    assert q[0, 0, :4].tolist() == [-127, 0, 2, -2]
    assert q[0, 1].tolist() == [127] + [0] * 31
    assert scale.tolist() == [[2, np.float32(1e-3) / np.float32(127)]]
    zeros, scale = quantise_blocks(np.zeros((2, 40), np.float32))
    assert not zeros.any()
    assert np.isfinite(scale).all()


def dumb(x: Any, weight: Int8Weight) -> Any:
    """The definition, number by number."""
    real = x.dtype.type
    (q_w,), (scale_w,) = parts_of(weight)
    y = np.zeros((len(x), weight.outputs), x.dtype)
    for n in range(len(x)):
        for o in range(weight.outputs):
            for b, first in enumerate(range(0, weight.inputs, BLOCK)):
                block = x[n, first : first + BLOCK]
                gamma = max(np.abs(block).max(), real(1e-30))
                total = sum(
                    int(np.rint(value * (real(127) / gamma))) * int(w)
                    for value, w in zip(block, q_w[o, first : first + BLOCK], strict=True)
                )
                y[n, o] += real(total) * (real(scale_w[o, b]) * (gamma / real(127)))
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_are_added_in_their_order(dtype: Any) -> None:
    # [spec 5 8-bit weights]
    r = Inputs(5, dtype)
    weight = to_int8(r(1, 3, 100).astype(np.float32))
    x = r(4, 100)
    same_bits(NUMPY.linear(x, weight, None), dumb(x, weight))


def case(rows: int, outputs: int, inputs: int, spread: float = 1.0) -> dict[str, Any]:
    return {"rows": rows, "outputs": outputs, "inputs": inputs, "spread": spread, "seed": 6}


@of_each_set
@always([case(n, 35, 70) for n in (1, 2, 3, 4, 5, 7, 8, 9, 11, 15)])  # all tiles
@always([case(0, 5, 40), case(1, 1, 1), case(3, 17, 31), case(3, 16, 32), case(2, 15, 33)])
@always([case(1, 2100, 600), case(257, 70, 130), case(70, 300, 65)])  # on several threads
@given(
    rows=st.integers(1, 20),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e20]),
    seed=SEEDS,
)
@quick(25)
def test_a_linear_map_has_the_bits_of_the_definition(
    instruction_set: str, rows: int, outputs: int, inputs: int, spread: float, seed: int
) -> None:
    # [spec 5 8-bit weights]
    r = Inputs(seed, np.float32)
    weight, x, b = to_int8(r(1, outputs, inputs)), r(rows, inputs, spread=spread), r(outputs)
    with unchanged(x, b, weight.q, weight.scale):
        same_bits(SETS[instruction_set].linear(x, weight, b), NUMPY.linear(x, weight, b))


@of_numba
def test_float64_has_the_bits_of_the_definition_too() -> None:
    r = Inputs(9, np.float64)
    weight, x = to_int8(r(1, 37, 91).astype(np.float32)), r(7, 91)
    same_bits(NUMBA.linear(x, weight, None), NUMPY.linear(x, weight, None))


@of_each_set
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_extreme_integers_and_scales_have_the_bits_of_the_definition(
    instruction_set: str, rows: int
) -> None:
    """The largest pairs of products; scales from float16's smallest to its largest, and 0."""
    rng = np.random.default_rng(rows)
    halves = np.array([0, 2**-24, 2**-14, 1, 65504], np.float16)
    weight = empty_int8(1, 48, 96)
    for q_w in (127, -127, -128, rng.choice([-127, 0, 127], weight.q.shape)):
        weight.q[...] = q_w
        weight.scale[...] = rng.choice(halves, weight.scale.shape)
        for x in (np.ones((rows, 96)), -np.ones((rows, 96)), rng.choice([-1, 1], (rows, 96))):
            x = x.astype(np.float32)
            same_bits(SETS[instruction_set].linear(x, weight, None), NUMPY.linear(x, weight, None))


@of_each_set
def test_a_row_with_nan_or_infinity_spoils_itself_alone(instruction_set: str) -> None:
    r = Inputs(10, np.float32)
    weight, x = to_int8(r(1, 40, 70)), r(6, 70)
    clean = NUMPY.linear(x, weight, None)
    x[1, 5], x[3, 69], x[4, 0] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        results = [ops.linear(x, weight, None) for ops in (SETS[instruction_set], NUMPY)]
    for y in results:
        assert np.isnan(y[1]).all()
        assert not np.isfinite(y[[3, 4]]).any()
        same_bits(y[[0, 2, 5]], clean[[0, 2, 5]])


@of_numba
def test_each_expert_multiplies_its_own_rows_and_some_have_none() -> None:
    # [spec 5 8-bit weights]
    r, ops = Inputs(11, np.float32), NUMBA
    gate_up, down = to_int8(r(4, 2 * 19, 33)), to_int8(r(4, 33, 19))
    x_MU, expert_MK = r(11, 33), np.array([[2], [0], [2], [2], [0], [2], [2], [2], [0], [2], [2]])
    sent: Dispatch = ops.dispatch(expert_MK, experts=4, capacity=None)  # 1 and 3 have none
    ones = np.ones((11, 1), np.float32)
    y_MU, _ = ops.expert_ffn(x_MU, ones, sent, gate_up, down, None, activation="silu", eps=1e-5)
    for e in (0, 2):
        rows = expert_MK[:, 0] == e
        gate_up_R2F = NUMPY.linear(x_MU[rows], expert(gate_up, e), None)
        h_RF = ops.gated_activation(gate_up_R2F, activation="silu")
        same_bits(y_MU[rows] + 0, NUMPY.linear(h_RF, expert(down, e), None) + 0)


def test_8_bit_weights_have_no_backward() -> None:
    r = Inputs(18, np.float32)
    w = to_int8(r(1, 4, 6))
    for ops in filter(None, (NUMPY, NUMBA)):
        with pytest.raises(TypeError, match="packed"):
            ops.linear_backward(r(3, 4), r(3, 6), w, r(4, 6), None)
        stacks = to_int8(r(2, 8, 6)), to_int8(r(2, 6, 4))
        sent = ops.dispatch(np.array([[0], [1], [1]]), experts=2, capacity=None)
        given = (r(3, 6), r(3, 1), sent, *stacks, None)
        _, cache = ops.expert_ffn(*given, activation="silu", eps=1e-5)
        with pytest.raises(TypeError, match="packed"):
            ops.expert_ffn_backward(
                r(3, 6), *given, cache, r(2, 8, 6), r(2, 6, 4), None, activation="silu"
            )


def test_the_cuda_backend_says_that_it_has_no_such_product() -> None:
    r, ops = Inputs(19, np.float32), cuda_operations()
    with pytest.raises(UserError, match=r"--backend cuda: .*int8.*--backend numba"):
        ops.linear(ops.to_device(r(3, 6)), to_int8(r(1, 4, 6)), None)
