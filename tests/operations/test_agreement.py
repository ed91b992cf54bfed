"""The fast backend computes what the definition says, at every kind of size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.cases import (
    ACTIVATIONS,
    ADAMW,
    BACKENDS,
    BOUND,
    DTYPES,
    NUMBA,
    NUMPY,
    SEEDS,
    TABLE,
    Inputs,
    agree,
    always,
    copies,
    heads,
    quick,
    router_losses,
    router_sums,
    run_table,
    same_bits,
    unchanged,
)

WIDTHS = st.integers(1, 19)
# Around the blocks of 64, 128 and 256 rows, besides what is drawn below them.
EDGES = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257]
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
EPS = 1e-5

of_each_backend = pytest.mark.parametrize("name", BACKENDS)

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def test_one_run_of_the_whole_table_agrees(dtype: Any) -> None:
    expected, actual = run_table(NUMPY, dtype, seed=1), run_table(NUMBA, dtype, seed=1)
    assert set(expected) == set(actual) == TABLE
    for name in expected:
        # Each run feeds results on (rstd, gates): their errors pass through sums of up to 530.
        agree(actual[name], expected[name], unit=530**0.5)


# ---- linear maps -----------------------------------------------------------------------------


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


@always([case | {"bias": True, "seed": 3} for case in TILED])
@always([{"rows": n, "inputs": 1, "outputs": 1, "bias": False, "seed": 4} for n in EDGES])
@given(rows=LENGTHS, inputs=WIDTHS, outputs=WIDTHS, bias=st.booleans(), seed=SEEDS)
@quick(20)
def test_linear_agrees(dtype: Any, rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    r = Inputs(seed, dtype)
    x, w, dy = r(rows, inputs), r(outputs, inputs), r(rows, outputs)
    b = r(outputs) if bias else None
    with unchanged(x, w, b, dy):
        agree(NUMBA.linear(x, w, b), NUMPY.linear(x, w, b), unit=inputs**0.5)
        expected = [r(outputs, inputs), r(outputs) if bias else None]
        actual = copies(expected)
        dx = NUMPY.linear_backward(dy, x, w, *expected)
        agree(NUMBA.linear_backward(dy, x, w, *actual), dx, unit=outputs**0.5)
        agree(actual, expected, unit=rows**0.5)


@given(N=LENGTHS, V=WIDTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_embedding_agrees(dtype: Any, N: int, V: int, D: int, seed: int) -> None:
    r = Inputs(seed, dtype)
    ids, w, dx, expected = r.rng.integers(0, V, N), r(V, D), r(N, D), r(V, D)
    actual = expected.copy()
    with unchanged(ids, w, dx):
        np.testing.assert_array_equal(NUMBA.embedding(ids, w), NUMPY.embedding(ids, w))
        NUMPY.embedding_backward(dx, ids, expected)
        NUMBA.embedding_backward(dx, ids, actual)
    agree(actual, expected, unit=N**0.5)


# ---- normalisation ---------------------------------------------------------------------------


@always([{"N": N, "D": 13, "spread": 1.0, "seed": 5} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, spread=st.sampled_from([1.0, 1e-3, 0.0]), seed=SEEDS)
@quick(20)
def test_rms_norm_agrees(dtype: Any, N: int, D: int, spread: float, seed: int) -> None:
    r = Inputs(seed, dtype)
    x, w, dy, expected = r(N, D, spread=spread), r(D), r(N, D), r(D)
    actual = expected.copy()
    y, rstd = NUMPY.rms_norm(x, w, eps=EPS)
    with unchanged(x, w, dy, rstd):
        agree(NUMBA.rms_norm(x, w, eps=EPS), (y, rstd))
        dx = NUMPY.rms_norm_backward(dy, x, w, rstd, expected)
        # dx = rstd (dn - n mean(dn n)): the difference may cancel, wholly so for D = 1.
        unit = rstd.max() * np.abs(dy * w).max()
        agree(NUMBA.rms_norm_backward(dy, x, w, rstd, actual), dx, unit=unit)
    agree(actual, expected, unit=N**0.5)


@of_each_backend
@always([{"N": N, "D": 13, "seed": 6} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_a_gradient_can_be_added_to_another(dtype: Any, name: str, N: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), BACKENDS[name]
    x, w, square, dy, around, dw, dsquare = (
        *(r(N, D), r(D), r(D, D)),
        *(r(N, D), r(N, D), r(D), r(D, D)),
    )
    _, rstd = ops.rms_norm(x, w, eps=EPS)
    with unchanged(x, w, square, dy):
        dx, onto = ops.rms_norm_backward(dy, x, w, rstd, dw), around.copy()
        assert ops.rms_norm_backward(dy, x, w, rstd, dw, onto_ND=onto) is onto
        agree(onto, around + dx, unit=rstd.max() * np.abs(dy * w).max() + 4)
        dx, onto = ops.linear_backward(dy, x, square, dsquare, None), around.copy()
        assert ops.linear_backward(dy, x, square, dsquare, None, onto_NI=onto) is onto
        agree(onto, around + dx, unit=D**0.5 + 4)


@of_each_backend
@always([{"N": N, "D": 13, "seed": 7} for N in EDGES])
@given(N=LENGTHS, D=WIDTHS, seed=SEEDS)
@quick(20)
def test_a_sum_is_normed_as_if_added_before(dtype: Any, name: str, N: int, D: int, seed: int) -> None:
    r, ops = Inputs(seed, dtype), BACKENDS[name]
    x, branch, w = r(N, D), r(N, D), r(D)
    total = x + branch
    with unchanged(x, w):
        found = ops.add_in_place_and_norm(x, branch, w, eps=EPS)
    np.testing.assert_array_equal(branch, total)
    same_bits(found, ops.rms_norm(total, w, eps=EPS))


# ---- attention -------------------------------------------------------------------------------

GROUPS = st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)])
# Around the 64 query rows of a task.
LATEST = [{"T": T, "S": S} for T in (63, 64, 65, 129) for S in (T, T + 66)]
LATEST += [{"T": 1, "S": S} for S in (1, 2, 65, 128)]


@given(B=st.integers(1, 3), T=LENGTHS, A=st.integers(1, 4), J=st.integers(1, 5), seed=SEEDS)
@quick(20)
def test_rotate_in_place_agrees(dtype: Any, B: int, T: int, A: int, J: int, seed: int) -> None:
    r = Inputs(seed, dtype)
    whole, cos, sin = r(B, T, A + 2, 2 * J), r(T, J), r(T, J)
    expected, actual = whole.copy(), whole.copy()
    with unchanged(cos, sin):
        NUMPY.rotate_in_place(expected[:, :, :A], cos, sin)
        NUMBA.rotate_in_place(actual[:, :, :A], cos, sin)
    agree(actual, expected)
    np.testing.assert_array_equal(actual[:, :, A:], whole[:, :, A:])  # the other heads stay


@always([size | {"B": 2, "group": (4, 2), "C": 6, "seed": 6} for size in LATEST])
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    S=st.integers(1, 40),
    group=GROUPS,
    C=st.integers(1, 12),
    seed=SEEDS,
)
@quick(20)
def test_attention_agrees(
    dtype: Any, B: int, T: int, S: int, group: tuple[int, int], C: int, seed: int
) -> None:
    T, (A, G) = min(T, S), group
    q, k, v = Inputs(seed, dtype).joint(B, S, A, G, C)
    q = q[:, S - T :]
    with unchanged(q, k, v):
        agree(NUMBA.attention(q, k, v), NUMPY.attention(q, k, v))


@pytest.mark.parametrize(("S", "room"), [(1, 5), (64, 70), (65, 65)])
def test_attention_of_one_position_to_a_longer_cache_agrees(dtype: Any, S: int, room: int) -> None:
    # As in generation: the keys and values are the filled part of a cache of another layout.
    r = Inputs(20, dtype)
    q, _, _ = r.joint(2, 1, 4, 2, 6)
    kv = r(2, room, 4, 6)
    k, v = kv[:, :S, :2], kv[:, :S, 2:]
    agree(NUMBA.attention(q, k, v), NUMPY.attention(q, k, v))


@always([{"B": 2, "T": T, "group": (4, 2), "C": 6, "seed": 7} for T in (1, 63, 64, 65, 129)])
@given(B=st.integers(1, 3), T=st.integers(1, 40), group=GROUPS, C=st.integers(1, 12), seed=SEEDS)
@quick(20)
def test_attention_backward_agrees(
    dtype: Any, B: int, T: int, group: tuple[int, int], C: int, seed: int
) -> None:
    r, (A, G) = Inputs(seed, dtype), group
    q, k, v = r.joint(B, T, A, G, C)
    out, log_sum_exp = NUMPY.attention(q, k, v)
    dout = r(B, T, A, C)
    # Written, not added: what the arrays held before must not matter.
    expected, actual = r(B, T, A + 2 * G, C), r(B, T, A + 2 * G, C)
    given_arrays = (dout, q, k, v, out, log_sum_exp)
    with unchanged(*given_arrays):
        NUMPY.attention_backward(*given_arrays, *heads(expected, A, G))
        NUMBA.attention_backward(*given_arrays, *heads(actual, A, G))
    # dp - dout.out cancels: wholly so for the first position, which sees one key.
    agree(actual, expected, unit=np.abs(dout).max() * np.abs(v).max() * C)


# ---- feed-forward ----------------------------------------------------------------------------


@always([{"N": N, "F": 7, "spread": 1.0, "seed": 8} for N in EDGES])
# Far outside the range of a float32 exp, and of a float64 one.
@always([{"N": 70, "F": 9, "spread": spread, "seed": 9} for spread in (100.0, 1000.0)])
@given(N=LENGTHS, F=WIDTHS, spread=st.sampled_from([0.0, 1.0, 5.0, 100.0]), seed=SEEDS)
@quick(15)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_agrees(
    dtype: Any, activation: Any, N: int, F: int, spread: float, seed: int
) -> None:
    r = Inputs(seed, dtype)
    gate_up, dh = r(N, 2 * F, spread=spread), r(N, F)
    with unchanged(gate_up, dh):
        agree(
            NUMBA.gated_activation(gate_up, activation=activation),
            NUMPY.gated_activation(gate_up, activation=activation),
        )
        # silu' = s + g s (1 - s): for a large g, the rounding of 1 - s is multiplied by g.
        agree(
            NUMBA.gated_activation_backward(dh, gate_up, activation=activation),
            NUMPY.gated_activation_backward(dh, gate_up, activation=activation),
            unit=np.abs(gate_up[:, :F] * gate_up[:, F:] * dh).max(),
        )


# ---- routing and experts ---------------------------------------------------------------------


@st.composite
def choices(draw: Any) -> tuple[int, int]:
    """E experts, K of which are chosen: K = E and E = 1 among them."""
    E = draw(st.integers(1, 9))
    return E, draw(st.one_of(st.just(E), st.integers(1, E)))


ALL_CHOICES = [(1, 1), (2, 1), (2, 2), (5, 2), (7, 7), (130, 3)]


@always([{"M": M, "choice": (6, 2), "levels": 2, "seed": 10} for M in EDGES])
@always([{"M": 70, "choice": c, "levels": n, "seed": 11} for c in ALL_CHOICES for n in (0, 1, 3)])
@given(M=LENGTHS, choice=choices(), levels=st.integers(0, 3), seed=SEEDS)
@quick(20)
@pytest.mark.parametrize("normalise", [False, True])
def test_route_agrees(
    dtype: Any, normalise: bool, M: int, choice: tuple[int, int], levels: int, seed: int
) -> None:
    r, (E, K) = Inputs(seed, dtype), choice
    # With few levels, probabilities tie exactly (levels = 1: all of them); 0 means no levels.
    logits = r.rng.integers(0, levels, (M, E)).astype(dtype) if levels else r(M, E, spread=3.0)
    with unchanged(logits):
        expected = NUMPY.route(logits, top_k=K, normalise=normalise)
        actual = NUMBA.route(logits, top_k=K, normalise=normalise)
    np.testing.assert_array_equal(actual.expert_MK, expected.expert_MK)
    agree(actual, expected)
    lower_first = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(actual.expert_MK, lower_first)

    dgate, counted = r(M, K), r.rng.random(M) < 0.7
    losses = router_losses(r, E, counted)
    with unchanged(dgate, *expected, counted, losses.count_E):
        agree(
            NUMBA.route_backward(dgate, expected, counted, losses, normalise=normalise),
            NUMPY.route_backward(dgate, expected, counted, losses, normalise=normalise),
        )

    # Sums that go on from others, as in a step of several micro-batches.
    sent = NUMPY.dispatch(expected.expert_MK, experts=E, capacity=max(1, M // 2))
    sums = [router_sums(E), router_sums(E)]
    with unchanged(*expected, sent, counted):
        for _ in range(2):
            NUMPY.add_router_statistics(expected, sent, counted, sums[0])
            NUMBA.add_router_statistics(expected, sent, counted, sums[1])
    first, choice, p, dropped, squares = zip(*sums, strict=True)
    same_bits(first[1], first[0])
    same_bits(choice[1], choice[0])
    same_bits(dropped[1], dropped[0])
    # p is added up in its own dtype: M numbers up to 1.
    bound = BOUND[np.dtype(dtype)] * max(1, counted.sum())
    np.testing.assert_allclose(p[1], p[0], rtol=0, atol=bound)
    np.testing.assert_allclose(squares[1], squares[0], rtol=BOUND[np.dtype(dtype)])


LOADS = st.sampled_from(["even", "one", "half"])


@always([{"M": 40, "choice": c, "load": "even", "limit": 3, "seed": 12} for c in ALL_CHOICES])
@always([{"M": 40, "choice": (5, 3), "load": "one", "limit": n, "seed": 13} for n in (1, 39, 40)])
@given(
    M=LENGTHS,
    choice=choices(),
    load=LOADS,
    limit=st.one_of(st.none(), st.integers(1, 60)),
    seed=SEEDS,
)
@quick(30)
def test_dispatch_agrees(
    dtype: Any, M: int, choice: tuple[int, int], load: str, limit: int | None, seed: int
) -> None:
    E, K = choice
    expert = Inputs(seed, dtype).experts(M, E, K, load)
    with unchanged(expert):
        expected = NUMPY.dispatch(expert, experts=E, capacity=limit)
        actual = NUMBA.dispatch(expert, experts=E, capacity=limit)
    agree(actual, expected)


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


@always([case | {"seed": 21} for case in WIDE])
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn_agrees(
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
    sent = NUMPY.dispatch(r.experts(M, E, K, load), experts=E, capacity=limit)
    x, gate, norm = r(M, U), r(M, K), r(E, F) if sub_norm else None
    given_arrays = (x, gate, sent, r(E, 2 * F, U, spread=U**-0.5), r(E, U, F), norm)
    with unchanged(*given_arrays):
        y, cache = NUMPY.expert_ffn(*given_arrays, activation=activation, eps=EPS)
        actual_y, actual_cache = NUMBA.expert_ffn(*given_arrays, activation=activation, eps=EPS)
    agree(actual_y, y, unit=F**0.5)
    agree(actual_cache.gate_up_R2F, cache.gate_up_R2F)
    agree(actual_cache.rstd_R, cache.rstd_R)

    dy = r(M, U)
    expected = [r(E, 2 * F, U), r(E, U, F), r(E, F) if sub_norm else None]
    actual = copies(expected)
    with unchanged(dy, *given_arrays, *cache):
        gradients = NUMPY.expert_ffn_backward(
            dy, *given_arrays, cache, *expected, activation=activation
        )
        actual_gradients = NUMBA.expert_ffn_backward(
            dy, *given_arrays, cache, *actual, activation=activation
        )
    # The sub-norm's backward cancels as in test_rms_norm_agrees, and is then multiplied by rstd.
    steepest = 1.0 if cache.rstd_R is None else cache.rstd_R.max(initial=1.0)
    agree(actual_gradients, gradients, unit=steepest * (U * F) ** 0.5)
    agree(actual, expected, unit=steepest * (U * M) ** 0.5)
    dropped = sent.slot_MK < 0
    assert (actual_gradients[1][dropped] == 0).all()


# ---- loss ------------------------------------------------------------------------------------

# Around the 64 rows of a task, the 512 of a product and the strips of 512 of the vocabulary; then
# around a chunk of logits: 256 rows where 32 MiB hold fewer, 1024 where they hold more.
VOCABULARIES = [{"N": N, "V": V} for N in (63, 129, 513) for V in (511, 512, 513, 1025)]
CHUNKS = [{"N": N, "V": 40_000} for N in (256, 257)] + [{"N": N, "V": 7} for N in (1024, 1025)]


@always([case | {"D": 5, "ignored": 0.2, "seed": 16} for case in VOCABULARIES + CHUNKS])
@always([{"N": N, "V": 9, "D": 3, "ignored": 1.0, "seed": 17} for N in (1, 130)])
@given(N=LENGTHS, V=WIDTHS, D=WIDTHS, ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=SEEDS)
@quick(20)
def test_token_nll_agrees(dtype: Any, N: int, V: int, D: int, ignored: float, seed: int) -> None:
    r = Inputs(seed, dtype)
    x, w, target = r(N, D), r(V, D), r.rng.integers(0, V, N)
    target[r.rng.random(N) < ignored] = -100
    expected = r(V, D)
    actual = expected.copy()
    with unchanged(x, w, target):
        nll = NUMPY.token_nll(x, w, target)
        # nll is a difference of logits.
        largest_logit = np.abs(x @ w.T).max()
        agree(NUMBA.token_nll(x, w, target), nll, unit=largest_logit)
        both = NUMPY.token_nll_and_gradient(x, w, target, expected, dnll=0.3)
        actual_both = NUMBA.token_nll_and_gradient(x, w, target, actual, dnll=0.3)
    agree(actual_both, both, unit=largest_logit)
    agree(actual_both[0], nll, unit=largest_logit)
    agree(actual, expected, unit=N**0.5)
    assert (actual_both[0][target < 0] == 0).all()
    assert (actual_both[1][target < 0] == 0).all()


# ---- optimiser -------------------------------------------------------------------------------

FLAT = [1, 32767, 32768, 32769, 65535, 65536, 65537]


@always([{"P": P, "seed": 18} for P in FLAT])
@given(P=st.integers(1, 300), seed=SEEDS)
@quick(10)
def test_sum_of_squares_agrees(dtype: Any, P: int, seed: int) -> None:
    x = Inputs(seed, dtype)(P)
    expected, actual = np.ones(1), np.ones(1)
    with unchanged(x):
        NUMPY.add_sum_of_squares(x, expected)
        NUMBA.add_sum_of_squares(x, actual)
    # Sums of float64 whatever the input: positive terms, so n roundings at the very most.
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


@always([{"P": P, "step": 2, "squares": 4.0, "decay": 0.1, "seed": 19} for P in FLAT])
@given(
    P=st.integers(1, 300),
    step=st.sampled_from([1, 2, 1000]),
    squares=st.sampled_from([0.5, 1e4]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=SEEDS,
)
@quick(20)
def test_adamw_agrees(dtype: Any, P: int, step: int, squares: float, decay: float, seed: int) -> None:
    r = Inputs(seed, dtype)
    expected = [r(P), r(P), r(P), r(P) ** 2]
    expected[3][::3] = 0  # as at the first step
    actual = copies(expected)
    settings = ADAMW._replace(weight_decay=decay)
    total, guard = np.array([squares]), np.array([[squares, 1.0]])
    with unchanged(total, guard):
        for ops, state in ((NUMPY, expected), (NUMBA, actual)):
            ops.adamw_in_place(*state, total, guard, step=step, settings=settings)
    agree(actual, expected)
    assert not actual[1].any()
