"""What the table and its fast backend promise beside the values themselves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu.arithmetic import exp
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.table import AdamWSettings, Operations
from tests.operations.cases import (
    BACKENDS,
    DTYPES,
    NUMBA,
    SEEDS,
    TABLE,
    Inputs,
    agree,
    flat,
    quick,
    run_table,
    same_bits,
    unchanged,
)

of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Operations:
    return BACKENDS[request.param]


# ---- the same bits ---------------------------------------------------------------------------


@of_each_dtype
def test_the_same_input_gives_the_same_bits_again(ops: Operations, dtype: Any) -> None:
    first, second = run_table(ops, dtype, seed=51), run_table(ops, dtype, seed=51)
    assert set(first) == TABLE
    for name in first:
        same_bits(second[name], first[name])


# ---- buffers ---------------------------------------------------------------------------------


def span(array: Any) -> tuple[int, int]:
    first = array.__array_interface__["data"][0]
    return first, first + array.nbytes


@pytest.fixture
def keeping() -> Operations:
    return load_operations("numba", keep_buffers=True)


@of_each_dtype
def test_kept_buffers_change_no_value(keeping: Operations, dtype: Any) -> None:
    expected = run_table(NUMBA, dtype, seed=52)
    for _ in range(2):  # the second time on memory that holds the first one's results
        with keeping.scope():
            actual = run_table(keeping, dtype, seed=52)
            for name in expected:
                same_bits(actual[name], expected[name])


def test_results_inside_one_scope_do_not_overlap(keeping: Operations) -> None:
    with keeping.scope():
        results = flat(list(run_table(keeping, np.float64, seed=53).values()))
        for a, b in itertools.pairwise(sorted(span(array) for array in results)):
            assert a[1] <= b[0]


def test_leaving_a_scope_gives_its_memory_to_the_next(keeping: Operations) -> None:
    r = Inputs(54, float)
    x, w = r(33, 5), r(7, 5)
    spans = []
    outside = keeping.linear(x, w, None)
    kept = outside.copy()
    for _ in range(3):
        with keeping.scope():
            spans.append([span(keeping.linear(x, w, None)), span(keeping.empty((9,), np.float32))])
    assert spans[0] == spans[1] == spans[2]
    same_bits(outside, kept)  # handed out before the scopes: never reused by them


def test_an_inner_scope_leaves_the_outer_ones_results_alone(keeping: Operations) -> None:
    with keeping.scope():
        outer = keeping.empty((1000,), np.float64)
        outer[:] = 1
        with keeping.scope():
            inner = keeping.empty((1000,), np.float64)
            inner[:] = 2
            freed = span(inner)
        after = keeping.empty((1000,), np.float64)
        assert span(after) == freed
        after[:] = 3
        assert (outer == 1).all()


def test_a_scope_left_by_an_exception_gives_its_memory_back(keeping: Operations) -> None:
    def fail() -> None:
        with keeping.scope():
            taken.append(span(keeping.empty((100,), np.float64)))
            raise ZeroDivisionError

    taken: list[tuple[int, int]] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert span(keeping.empty((100,), np.float64)) == taken[0]


def test_a_workspace_grows_beyond_one_block(keeping: Operations) -> None:
    # Blocks are of 32 MiB; the third request is larger than any block yet.
    shapes = [(3 << 20,), (3 << 20,), (5 << 20,), (7,)]
    spans = []
    for _ in range(2):
        with keeping.scope():
            arrays = [keeping.empty(shape, np.float64) for shape in shapes]
            assert [array.shape for array in arrays] == shapes
            spans.append([span(array) for array in arrays])
    assert spans[0] == spans[1]
    for a, b in itertools.pairwise(sorted(spans[0])):
        assert a[1] <= b[0]


@of_each_dtype
def test_without_kept_buffers_results_outlive_a_scope(dtype: Any) -> None:
    r = Inputs(55, dtype)
    x, w = r(33, 5), r(7, 5)
    with NUMBA.scope():
        y = NUMBA.linear(x, w, None)
    kept = y.copy()
    with NUMBA.scope():
        other = NUMBA.linear(-x, w, None)
    assert not np.shares_memory(y, other)
    same_bits(y, kept)


# ---- the router and the dispatch -------------------------------------------------------------


@of_each_dtype
@given(M=st.integers(1, 80), E=st.integers(1, 70), seed=SEEDS)
@quick(25)
def test_the_routers_probabilities_and_normalised_gates_sum_to_one(
    dtype: Any, M: int, E: int, seed: int
) -> None:
    r = Inputs(seed, dtype)
    for backend in BACKENDS.values():
        routing = backend.route(r(M, E, spread=20.0), top_k=min(E, 3), normalise=True)
        # Each addend and the sum itself are rounded: E roundings at the very most.
        atol = (E + 4) * np.finfo(dtype).eps
        for weights in (routing.p_ME, routing.gate_MK):
            assert (weights >= 0).all()
            np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=atol)
        assert (np.diff(routing.gate_MK, axis=1) <= 0).all()  # most probable first


@of_each_dtype
@given(
    M=st.integers(1, 80),
    E=st.integers(1, 9),
    K=st.integers(1, 9),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    share=st.sampled_from([0.2, 1.0]),
    seed=SEEDS,
)
@quick(50)
def test_logits_that_are_not_numbers_still_choose_valid_experts(
    dtype: Any, M: int, E: int, K: int, bad: float, share: float, seed: int
) -> None:
    # An index out of range would make the compiled dispatch write outside its arrays.
    r, K = Inputs(seed, dtype), min(K, E)
    logits = r(M, E)
    logits[r.rng.random((M, E)) < share] = bad
    expert = NUMBA.route(logits, top_k=K, normalise=True).expert_MK
    assert ((expert >= 0) & (expert < E)).all()
    assert all(len(set(row)) == K for row in expert.tolist())


@given(
    M=st.integers(1, 80),
    E=st.integers(1, 9),
    K=st.integers(1, 9),
    load=st.sampled_from(["even", "one", "half"]),
    capacity=st.one_of(st.none(), st.integers(1, 90)),
    seed=SEEDS,
)
@quick(50)
@pytest.mark.parametrize("name", BACKENDS)
def test_slot_and_route_of_a_dispatch_are_inverse(
    name: str, M: int, E: int, K: int, load: str, capacity: int | None, seed: int
) -> None:
    K = min(K, E)
    expert = Inputs(seed, float).experts(M, E, K, load)
    route, slot, start = BACKENDS[name].dispatch(expert, experts=E, capacity=capacity)
    assert (slot.ravel()[route] == np.arange(len(route))).all()
    kept = np.flatnonzero(slot.ravel() >= 0)
    assert (route[slot.ravel()[kept]] == kept).all()
    assert len(kept) == len(route)
    # Each segment holds its own expert's choices: all of them, or as many as the capacity allows.
    segment = np.repeat(np.arange(E), np.diff(start))
    assert (expert.ravel()[route] == segment).all()
    asked = np.bincount(expert.ravel(), minlength=E)
    assert (np.diff(start) == np.minimum(asked, M if capacity is None else capacity)).all()


# ---- experts ---------------------------------------------------------------------------------


def linear_experts(r: Inputs, M: int, E: int, K: int, U: int) -> tuple[Any, ...]:
    """Experts that are linear in all but the last coordinate of x, which is always one.

    Their gates read that coordinate alone, with weight one: relu2(1) = 1, so h = up(x).
    """
    x, gate_up, down = r(M, U + 1), np.zeros((E, 2 * U, U + 1), r.dtype), r(E, U + 1, U)
    x[:, U], gate_up[:, :U, U] = 1, 1
    gate_up[:, U:, :U] = r(E, U, U)
    return x, r(M, K), gate_up, down


EXPERT_SIZES = {
    "M": st.sampled_from([1, 5, 64, 65, 300]),
    "E": st.integers(1, 5),
    "K": st.integers(1, 5),
    "U": st.integers(1, 9),
    "load": st.sampled_from(["even", "one", "half"]),
    "capacity": st.one_of(st.none(), st.integers(1, 90)),
    "seed": SEEDS,
}


@given(**EXPERT_SIZES)
@quick(30)
@pytest.mark.parametrize("name", BACKENDS)
def test_identity_experts_return_x_times_its_gates_not_dropped(
    name: str, M: int, E: int, K: int, U: int, load: str, capacity: int | None, seed: int
) -> None:
    r, K, ops = Inputs(seed, float), min(K, E), BACKENDS[name]
    x, gate, gate_up, down = linear_experts(r, M, E, K, U)
    gate_up[:, U:, :U] = np.eye(U)
    down[...] = np.eye(U + 1, U)
    sent = ops.dispatch(r.experts(M, E, K, load), experts=E, capacity=capacity)
    y, _ = ops.expert_ffn(x, gate, sent, gate_up, down, None, activation="relu2", eps=1e-5)
    kept = np.where(sent.slot_MK >= 0, gate, 0).sum(axis=1)
    agree(y[:, :U], kept[:, None] * x[:, :U], unit=K)
    assert not y[:, U].any()


@given(**EXPERT_SIZES)
@quick(30)
@pytest.mark.parametrize("name", BACKENDS)
def test_gathering_and_combining_are_each_others_transpose(
    name: str, M: int, E: int, K: int, U: int, load: str, capacity: int | None, seed: int
) -> None:
    r, K, ops = Inputs(seed, float), min(K, E), BACKENDS[name]
    x, gate, gate_up, down = linear_experts(r, M, E, K, U)
    sent = ops.dispatch(r.experts(M, E, K, load), experts=E, capacity=capacity)
    weights = (gate_up, down, None)
    y, cache = ops.expert_ffn(x, gate, sent, *weights, activation="relu2", eps=1e-5)
    dy = r(M, U + 1)
    sums = (np.zeros_like(gate_up), np.zeros_like(down), None)
    dx, dgate = ops.expert_ffn_backward(dy, x, gate, sent, *weights, cache, *sums, activation="relu2")
    # y is linear in x (but for its constant one), in the gates and in down: <dy, y> from every side.
    products = [(dx * x)[:, :U], dgate * gate, sums[1] * down]
    terms = sum(np.abs(product).sum() for product in [*products, dy * y])
    for product in products:
        agree(product.sum(), (dy * y).sum(), unit=terms)


# ---- quantisers ------------------------------------------------------------------------------


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
    before, report = np.full_like(w, 9), np.zeros((1, 5))
    for backend in BACKENDS.values():
        q, beta = before.copy(), np.zeros(O, dtype)
        given = {"q_OI": q, "beta_O": beta, "report_X5": report}
        with unchanged(w):
            backend.quantise_weight(w, (0, O), quantization="bitnet_b158", **given)
        np.testing.assert_allclose(beta, max(magnitude, 1e-5), rtol=eps)
        inside = np.clip(w / beta.astype(float)[:, None], -1, 1)
        assert set(q.ravel()) <= {-1, 0, 1}
        assert (np.abs(q - inside) <= 0.5 + 2 * eps).all()
        ternary_beta = beta.copy()
        with unchanged(w):
            backend.quantise_weight(w, (0, O), quantization="bitnet", **given)
        same_bits(beta, ternary_beta)
        assert set(q.ravel()) <= {-1, 1}
        # A weight within the rounding of the mean may fall on either side of it.
        clear = np.abs(w - mean) > eps * abs(mean)
        assert (q == np.where(w > mean, 1, -1))[clear].all()


# ---- optimiser -------------------------------------------------------------------------------

ADAMW_BACKENDS = ["numpy", "numba"]


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
@pytest.mark.parametrize("name", ADAMW_BACKENDS)
def test_the_first_float32_second_moment_is_its_share_of_the_square(name: str, beta2: float) -> None:
    r = Inputs(59, np.float32)
    gradient = r(100)
    state = [r(100), gradient.copy(), r(100) * 0, r(100) * 0]
    settings = AdamWSettings(1e-3, 0.9, beta2, 1e-8, 0.0, clip_norm=1.0)
    BACKENDS[name].adamw_in_place(*state, np.ones(1), np.ones(1), step=1, settings=settings)
    # The factor, the square and the product are rounded once each: half an eps, thrice.
    exact = (1 - beta2) * gradient.astype(float) ** 2
    np.testing.assert_allclose(state[3], exact, rtol=2 * np.finfo(np.float32).eps)


# ---- attention -------------------------------------------------------------------------------


@of_each_dtype
@pytest.mark.parametrize("t", [0, 1, 62, 63, 64, 100, 128])
def test_a_later_key_or_value_leaves_earlier_outputs_as_they_are(
    ops: Operations, dtype: Any, t: int
) -> None:
    r = Inputs(56, dtype)
    q, k, v = r.joint(2, 130, 4, 2, 6)
    out, lse = ops.attention(q, k, v)
    out, lse = out.copy(), lse.copy()
    k[:, t + 1 :] += r(2, 129 - t, 2, 6)
    v[:, t + 1 :] += r(2, 129 - t, 2, 6)
    now, now_lse = ops.attention(q, k, v)
    same_bits([now[:, : t + 1], now_lse[:, :, : t + 1]], [out[:, : t + 1], lse[:, :, : t + 1]])
    assert (now[:, t + 1 :] != out[:, t + 1 :]).any(axis=(2, 3)).all()


@of_each_dtype
def test_attention_to_equal_values_returns_them(ops: Operations, dtype: Any) -> None:
    # The weights of the keys seen sum to one, so a mean of equal values is that value.
    q, k, v = Inputs(57, dtype).joint(2, 67, 4, 2, 6)
    v[...] = 3
    out, _ = ops.attention(q, k, v)
    np.testing.assert_allclose(out, 3, rtol=67 * np.finfo(dtype).eps)


# ---- exp -------------------------------------------------------------------------------------


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
