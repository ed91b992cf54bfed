"""The experts: gathered rows, two maps and a gated activation between, the gated sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.operations.table import BitWeight, Dispatch, Operations
from tests.cuda.backend import cuda_operations, on_the_device
from tests.operations import dumb
from tests.operations.cases import (
    BACKENDS,
    CUDA,
    EPS,
    FAST,
    LENGTHS,
    LOADS,
    NUMBA,
    NUMPY,
    SEEDS,
    TINY,
    WIDTHS,
    Inputs,
    agree,
    always,
    choices,
    copies,
    is_the_derivative,
    near,
    of_each_activation,
    of_each_backend,
    of_each_dtype,
    of_each_fast_backend,
    quick,
    unchanged,
)
from tests.operations.expert_sizes import ExpertSizes

of_each_norm = pytest.mark.parametrize("normed", [False, True], ids=["plain", "sub-norm"])

# ---- the definition --------------------------------------------------------------------------


@of_each_activation
@given(
    M=TINY,
    U=TINY,
    F=TINY,
    E=TINY,
    K=TINY,
    capacity=st.one_of(st.none(), st.integers(1, 4)),
    sub_norm=st.booleans(),
    seed=SEEDS,
)
@quick(40)
def test_expert_ffn_is_the_gated_sum_of_the_choices_not_dropped(
    activation: Any,
    M: int,
    U: int,
    F: int,
    E: int,
    K: int,
    capacity: int | None,
    sub_norm: bool,
    seed: int,
) -> None:
    # [P1 eq. 1, 3, 5], [GLU eq. 6], [spec 3 Expert]
    r, K = Inputs(seed, float), min(K, E)
    expert = r.experts(M, E, K, "even")
    sent = NUMPY.dispatch(expert, experts=E, capacity=capacity)
    x, gate, norm = r(M, U), r(M, K), r(E, F) if sub_norm else None
    up, down = r(E, 2 * F, U), r(E, U, F)
    y, _ = NUMPY.expert_ffn(x, gate, sent, up, down, norm, activation=activation, eps=EPS)
    near(y, dumb.expert_ffn(x, gate, expert, sent.slot_MK, up, down, norm, activation, EPS))
    # Quantised: float64's last bits, where the two differ, move no activation across a half.
    stacks = [BitWeight(np.rint(np.clip(w, -1, 1)), np.abs(r(*w.shape[:2]))) for w in (up, down)]
    pairs = [list(zip(stack.w, stack.beta, strict=True)) for stack in stacks]
    y, _ = NUMPY.expert_ffn(x, gate, sent, *stacks, norm, activation=activation, eps=EPS)
    near(y, dumb.expert_ffn(x, gate, expert, sent.slot_MK, *pairs, norm, activation, EPS))


# ---- one backend and the other ---------------------------------------------------------------

# Segments of one expert around its blocks of 256 rows; sums of rows around blocks of 64.
SEGMENTS = [
    {"M": M, "choice": (3, 2), "load": "one", "limit": limit}
    for M in (255, 256, 257, 520)
    for limit in (None, 256, 257)
]
SEGMENTS += [{"M": M, "choice": (4, 2), "load": "half", "limit": 20} for M in (63, 64, 65)]
SEGMENTS += [{"M": 1, "choice": (1, 1), "load": "even", "limit": 1}]
# More than 2^19 multiply-adds, which run in parallel; those above are below that.
WIDE = [
    {"M": 260, "choice": (3, 2), "load": "one", "limit": limit, "sub_norm": norm, "U": 19, "F": 37}
    for limit in (None, 257)
    for norm in (True, False)
]


# Columns of several tiles, in rows that begin where 16 bytes may be moved at once, or not.
TILES = [
    {"M": 70, "choice": (3, 2), "load": "one", "limit": 60, "sub_norm": True, "U": U, "F": F}
    for U, F in ((132, 68), (131, 67))
]
# A weight's gradient in parts.
TILES += [
    {"M": 700, "choice": (1, 1), "load": "even", "limit": limit, "sub_norm": False, "U": 8, "F": 4}
    for limit in (None, 3)
]


def as_sent_by(ops: Operations, sent: Dispatch) -> Dispatch:
    """The GPU's own dispatch gives a bound's length, which no capacity lowers: the rest is nobody's."""
    if ops is NUMBA:
        return sent
    return sent._replace(route_R=np.append(sent.route_R, np.full(sent.slot_MK.size % 71, -1)))


def agrees_with_the_definition(
    ops: Operations,
    r: Inputs,
    routed: Any,
    gate_up: Any,
    down: Any,
    norm: Any,
    activation: Any,
    *,
    coarser: float = 1,
) -> None:
    """Forward and backward, entry by entry; coarser: how much, than by roundings of the dtype."""
    sent, R = routed[2], len(routed[2].route_R)
    given_arrays = (*routed, gate_up, down, norm)
    with unchanged(*given_arrays):
        y, cache = NUMPY.expert_ffn(*given_arrays, activation=activation, eps=EPS)
    sizes = ExpertSizes(*given_arrays, cache, activation)
    own_arrays = (*routed[:2], as_sent_by(ops, sent), gate_up, down, norm)
    with unchanged(*own_arrays):
        own_y, own_cache = ops.expert_ffn(*own_arrays, activation=activation, eps=EPS)
    gate_up_R2F, rstd_R = own_cache
    used = own_cache._replace(
        gate_up_R2F=gate_up_R2F[:R], rstd_R=None if rstd_R is None else rstd_R[:R]
    )
    agree((own_y, used), (y, cache), *_times(coarser, sizes.forward()))
    assert not gate_up_R2F[R:].any()
    assert rstd_R is None or not rstd_R[R:].any()

    dy = r(*routed[0].shape)
    expected_sums = [r(*gate_up.shape), r(*down.shape), None if norm is None else r(*norm.shape)]
    actual_sums, before = copies(expected_sums), copies(expected_sums)
    with unchanged(dy, *given_arrays, *cache):
        expected = NUMPY.expert_ffn_backward(
            dy, *given_arrays, cache, *expected_sums, activation=activation
        )
    nobodys = len(own_arrays[2].route_R) - R
    padded = cache._replace(
        gate_up_R2F=np.pad(cache.gate_up_R2F, [(0, nobodys), (0, 0)]),
        rstd_R=None if cache.rstd_R is None else np.pad(cache.rstd_R, (0, nobodys)),
    )
    with unchanged(dy, *own_arrays, *padded):
        found = ops.expert_ffn_backward(dy, *own_arrays, padded, *actual_sums, activation=activation)
    errors = _times(coarser, sizes.backward(dy, before))
    agree([*found, *actual_sums], [*expected, *expected_sums], *errors)
    assert (found[1][sent.slot_MK < 0] == 0).all()


def _times(factor: float, sizes: Any) -> list[Any]:
    return [None if size is None else factor * size for size in sizes]


@of_each_fast_backend
@of_each_dtype
@of_each_activation
@always([case | {"seed": 21} for case in WIDE])
@always([case | {"seed": 22} for case in TILES])
@always([case | {"sub_norm": True, "U": 5, "F": 3, "seed": 14} for case in SEGMENTS])
@always([case | {"sub_norm": False, "U": 1, "F": 7, "seed": 15} for case in SEGMENTS])
@given(
    M=LENGTHS,
    choice=choices(),
    load=LOADS,
    limit=st.one_of(st.none(), st.integers(1, 60)),
    sub_norm=st.booleans(),
    U=WIDTHS,
    F=WIDTHS,
    seed=SEEDS,
)
@quick(20)
def test_expert_ffn_agrees(
    name: str,
    dtype: Any,
    activation: Any,
    M: int,
    choice: tuple[int, int],
    load: str,
    limit: int | None,
    sub_norm: bool,
    U: int,
    F: int,
    seed: int,
) -> None:
    r, (E, K) = Inputs(seed, dtype), choice
    routed, norm = r.routed(M, U, E, K, load, limit), r(E, F) if sub_norm else None
    agrees_with_the_definition(
        FAST[name], r, routed, r(E, 2 * F, U, spread=U**-0.5), r(E, U, F), norm, activation
    )


@pytest.mark.parametrize(
    ("matmul", "coarser"),
    [pytest.param("tf32", 2**13, marks=on_the_device), pytest.param("tf32x3", 1, marks=on_the_device)],
)
@pytest.mark.parametrize(("U", "F"), [(20, 72), (131, 9)])
def test_tensor_cores_agree_to_their_precision(matmul: Any, coarser: float, U: int, F: int) -> None:
    # TF32 has 10 bits of mantissa where float32 has 23; three products of it give about those.
    r, ops = Inputs(31, np.float32), on_host(cuda_operations(matmul=matmul))
    routed, norm = r.routed(150, U, 3, 2, "one", 140), r(3, F)
    gate_up, down = r(3, 2 * F, U, spread=U**-0.5), r(3, U, F)
    agrees_with_the_definition(ops, r, routed, gate_up, down, norm, "silu", coarser=coarser)
    by_tensor_cores, plainly = (
        o.expert_ffn(*routed, gate_up, down, None, activation="silu", eps=EPS)[0] for o in (ops, CUDA)
    )
    assert (by_tensor_cores != plainly).any()


@of_each_fast_backend
@of_each_activation
@of_each_norm
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
def test_quantised_experts_agree(
    name: str,
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
    routed = r.routed(M, U, E, K, load, capacity)
    stacks = r.bits("ternary-2bit", E, 2 * F, U), r.bits("sign-1bit", E, U, F)
    agrees_with_the_definition(FAST[name], r, routed, *stacks, r(E, F) if normed else None, activation)


# ---- gradients -------------------------------------------------------------------------------


@of_each_backend
@of_each_activation
@of_each_norm
@pytest.mark.parametrize("capacity", [None, 3])
def test_expert_ffn_backward_is_the_derivative(
    name: str, activation: Any, normed: bool, capacity: int | None
) -> None:
    # [P1 eq. 3], [spec 3 Expert]
    rng = np.random.default_rng(43)
    case = operation_checks.expert_ffn(
        BACKENDS[name], rng, activation=activation, normed=normed, capacity=capacity
    )
    is_the_derivative(case)
    if activation == "silu":  # squared ReLU may be 0 by itself
        dgate_MK = case.back([rng.standard_normal(case.arguments["x_MU"].shape)])["gate_MK"]
        assert (dgate_MK == 0).any() == (capacity is not None)


# ---- special promises ------------------------------------------------------------------------


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
    "load": LOADS,
    "capacity": st.one_of(st.none(), st.integers(1, 90)),
    "seed": SEEDS,
}


@of_each_backend
@given(**EXPERT_SIZES)
@quick(30)
def test_identity_experts_return_x_times_its_gates_not_dropped(
    name: str, M: int, E: int, K: int, U: int, load: str, capacity: int | None, seed: int
) -> None:
    r, K, ops = Inputs(seed, float), min(K, E), BACKENDS[name]
    x, gate, gate_up, down = linear_experts(r, M, E, K, U)
    gate_up[:, U:, :U] = np.eye(U)
    down[...] = np.eye(U + 1, U)
    sent = ops.dispatch(r.experts(M, E, K, load), experts=E, capacity=capacity)
    y, _ = ops.expert_ffn(x, gate, sent, gate_up, down, None, activation="relu2", eps=EPS)
    kept = np.where(sent.slot_MK >= 0, gate, 0)
    size = np.abs(kept).sum(axis=1)[:, None] * np.abs(x[:, :U])
    agree(y[:, :U], kept.sum(axis=1)[:, None] * x[:, :U], size)
    assert not y[:, U].any()


@of_each_backend
@given(**EXPERT_SIZES)
@quick(30)
def test_gathering_and_combining_are_each_others_transpose(
    name: str, M: int, E: int, K: int, U: int, load: str, capacity: int | None, seed: int
) -> None:
    r, K, ops = Inputs(seed, float), min(K, E), BACKENDS[name]
    x, gate, gate_up, down = linear_experts(r, M, E, K, U)
    sent = ops.dispatch(r.experts(M, E, K, load), experts=E, capacity=capacity)
    weights = (gate_up, down, None)
    y, cache = ops.expert_ffn(x, gate, sent, *weights, activation="relu2", eps=EPS)
    dy = r(M, U + 1)
    sums = (np.zeros_like(gate_up), np.zeros_like(down), None)
    dx, dgate = ops.expert_ffn_backward(dy, x, gate, sent, *weights, cache, *sums, activation="relu2")
    # y is linear in x (but for its constant one), in the gates and in down: <dy, y> from every side.
    products = [(dx * x)[:, :U], dgate * gate, sums[1] * down]
    terms = sum(np.abs(product).sum() for product in [*products, dy * y])
    for product in products:
        agree(product.sum(), (dy * y).sum(), terms)
