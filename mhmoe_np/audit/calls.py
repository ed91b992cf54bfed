"""One call or more of every operation of the table: what backends and peers are compared on.

Operands are seeded, and large enough that the fast backends take their parallel and tiled ways. What
one operation is given of another's results, the definition computes: errors do not run into each other.

Where two linear maps of a BitLinear follow each other, squared ReLU without a sub-norm stands between
them: it rounds alike on all backends, so that no quantiser sees other bits and takes a neighbour [D9].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.packing import pack
from mhmoe_np.operations.table import (
    Activation,
    AdamWSettings,
    BitWeight,
    Operations,
    PackedWeight,
    RouterLosses,
    RouterSums,
    Weight,
)
from mhmoe_np.types import FloatArray

EPS = 1e-5
IGNORED = -100
N, D, V = 300, 37, 530  # tokens, width, vocabulary
M, E, K = 500, 5, 2  # sub-tokens, experts, choices
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    """One call of one operation.

    form: which of an operation's forms it is; empty where there is one.
    exact: all backends must return the same bits.
    """

    operation: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = NO_OPTIONS
    form: str = ""
    exact: bool = False


class _Draw:
    """Arrays of one dtype from one seed, and the definition that makes operands of them."""

    def __init__(self, dtype: DTypeLike, ops: Operations) -> None:
        self.ops = ops
        self.rng = np.random.default_rng(0)
        self.dtype = np.dtype(dtype)

    def __call__(self, *shape: int) -> FloatArray:
        """Standard normal numbers."""
        return self.rng.standard_normal(shape).astype(self.dtype)

    def bits(self, *shape: int) -> BitWeight:
        """Ternary weights and their scales."""
        w = self.rng.integers(-1, 2, shape).astype(self.dtype)
        return BitWeight(w, np.abs(self(*shape[:-1])))


def calls(dtype: DTypeLike, *, definition: Operations) -> Iterator[Call]:
    """Calls of every operation of the table, operands of that float type.

    definition: `numpy_ref`, which computes what an operation is given of another's results.
    """
    draw = _Draw(dtype, definition)
    for make in (_sums, _linear, _quantisers, _norm, _attention, _feed_forward, _router, _experts):
        yield from make(draw)
    yield from _loss(draw)
    yield from _optimiser(draw)


def _packed(bits: BitWeight) -> PackedWeight:
    """The same integers packed; a single matrix is a stack of one."""
    w = bits.w.reshape(-1, *bits.w.shape[-2:])
    return PackedWeight(pack(w, "ternary-2bit"), bits.beta.reshape(w.shape[:2]))


def _sums(draw: _Draw) -> Iterator[Call]:
    yield Call("add_in_place", (draw(N, D), draw(N, D)))
    yield Call("add_sum", (draw(N), np.ones(1)))


def _linear(draw: _Draw) -> Iterator[Call]:
    x_NI, dy_NO, b_O, bits = draw(N, D), draw(N, V), draw(V), draw.bits(V, D)
    w_OI, id_N = draw(V, D), draw.rng.integers(0, V, N)
    yield Call("linear", (x_NI, w_OI, b_O))
    yield Call("linear", (x_NI, bits, b_O), form="quantised", exact=True)
    yield Call("linear", (x_NI, _packed(bits), b_O), form="packed", exact=True)
    for form, weight in (("", w_OI), ("quantised", bits)):
        yield Call("linear_backward", (dy_NO, x_NI, weight, draw(V, D), draw(V)), form=form)
    yield Call("embedding", (id_N, w_OI), exact=True)
    yield Call("embedding_backward", (x_NI, id_N, draw(V, D)))


def _quantisers(draw: _Draw) -> Iterator[Call]:
    yield Call("quantise_rows", (draw(N, D),), exact=True)
    for quantization in ("bitnet_b158", "bitnet"):
        starts = (0, 1, 200, V)
        overwritten = {
            "q_OI": np.zeros((V, D), draw.dtype),
            "beta_O": np.zeros(V, draw.dtype),
            "report_X5": np.zeros((len(starts) - 1, 5)),
        }
        yield Call(
            "quantise_weight",
            (draw(V, D), starts),
            {"quantization": quantization, **overwritten},
            form=quantization,
            exact=True,
        )
    bits = draw.bits(E, V, D)
    room = pack(np.zeros_like(bits.w), "ternary-2bit")
    yield Call("pack_in_place", (bits.w, room), exact=True)


def _norm(draw: _Draw) -> Iterator[Call]:
    x_ND, w_D, dy_ND, options = draw(N, D), draw(D), draw(N, D), {"eps": EPS}
    _, rstd_N = draw.ops.rms_norm(x_ND, w_D, eps=EPS)
    yield Call("rms_norm", (x_ND, w_D), options)
    yield Call("add_in_place_and_norm", (x_ND, draw(N, D), w_D), options)
    yield Call("rms_norm_backward", (dy_ND, x_ND, w_D, rstd_N, draw(D)))


def _attention(draw: _Draw) -> Iterator[Call]:
    B, T, A, G, C, first = 2, 90, 4, 2, 6, 2
    angle_YJ = draw.rng.standard_normal((T + 3, C // 2))
    tables = np.cos(angle_YJ).astype(draw.dtype), np.sin(angle_YJ).astype(draw.dtype)
    yield Call("rotate_in_place", (draw(B, T, A, C), *tables, np.array([first])))
    qkv = draw(B, T, A, C), draw(B, T, G, C), draw(B, T, G, C)
    results = draw.ops.attention(*qkv)
    yield Call("attention", qkv)
    new = draw(B, 3, A, C), draw(B, 3, G, C), draw(B, 3, G, C)
    yield Call("attention_with_cache", (*new, draw(B, T, 2 * G, C), np.array([70])))
    room = (np.zeros_like(array) for array in qkv)
    yield Call("attention_backward", (draw(B, T, A, C), *qkv, *results, *room))


def _feed_forward(draw: _Draw) -> Iterator[Call]:
    gate_up_N2F, dh_NF = draw(N, 2 * D), draw(N, D)
    for activation in ("silu", "relu2"):
        options = {"activation": activation}
        yield Call("gated_activation", (gate_up_N2F,), options, form=activation)
        yield Call("gated_activation_backward", (dh_NF, gate_up_N2F), options, form=activation)


def _router(draw: _Draw) -> Iterator[Call]:
    counted_M, count_E = draw.rng.random(M) < 0.7, draw.rng.integers(1, 9, E).astype(np.float64)
    logits_ME, dgate_MK = draw(M, E), draw(M, K)
    losses = RouterLosses(count_E, int(count_E.sum()), int(counted_M.sum()), daux=0.7, dz=0.3)
    for form, normalise in (("raw", False), ("normalised", True)):
        options = {"normalise": normalise}
        routing = draw.ops.route(logits_ME, top_k=K, normalise=normalise)
        yield Call("route", (logits_ME,), {"top_k": K, **options}, form=form)
        yield Call("route_backward", (dgate_MK, routing, counted_M, losses), options, form=form)
    sent = {"experts": E, "capacity": 150}
    totals = RouterSums(np.zeros(E), np.zeros(E), np.zeros(E), np.zeros(E), np.zeros(1))
    dispatch = draw.ops.dispatch(routing.expert_MK, experts=E, capacity=150)
    yield Call("dispatch", (routing.expert_MK,), sent, exact=True)
    yield Call("add_router_statistics", (routing, dispatch, counted_M, totals))


def _experts(draw: _Draw) -> Iterator[Call]:
    U, F = 43, 61
    expert_MK = np.argsort(draw.rng.random((M, E)), axis=1)[:, :K].copy()
    x_MU, gate_MK, dy_MU = draw(M, U), draw(M, K), draw(M, U)
    floats, bits = (draw(E, 2 * F, U), draw(E, U, F)), (draw.bits(E, 2 * F, U), draw.bits(E, U, F))
    sub_norm_EF = draw(E, F)
    forms: list[tuple[str, int | None, tuple[Weight, Weight], FloatArray | None, Activation]] = [
        ("", None, floats, None, "silu"),
        ("sub-norm, capacity", 150, floats, sub_norm_EF, "silu"),
        ("quantised", 150, bits, None, "relu2"),
    ]
    for form, capacity, weights, norm, activation in forms:
        dispatch = draw.ops.dispatch(expert_MK, experts=E, capacity=capacity)
        given = (x_MU, gate_MK, dispatch, *weights, norm)
        options = {"activation": activation}
        _, cache = draw.ops.expert_ffn(*given, activation=activation, eps=EPS)
        sums = draw(E, 2 * F, U), draw(E, U, F), None if norm is None else draw(E, F)
        yield Call("expert_ffn", given, {**options, "eps": EPS}, form=form)
        yield Call("expert_ffn_backward", (dy_MU, *given, cache, *sums), options, form=form)


def _loss(draw: _Draw) -> Iterator[Call]:
    # Logits as models have them: a probability is as many roundings off as its logit is large.
    x_ND, w_VD, target_N = draw(N, D), draw(V, D) / 4, draw.rng.integers(0, V, N)
    target_N[::5] = IGNORED
    yield Call("token_nll", (x_ND, w_VD, target_N))
    yield Call("token_nll_and_gradient", (x_ND, w_VD, target_N, draw(V, D)), {"dnll": 0.3})


def _optimiser(draw: _Draw) -> Iterator[Call]:
    P, step = 70_000, 3
    gradient_P = draw(P)
    state = draw(P), gradient_P, draw(P), draw(P) ** 2
    update_8 = AdamWSettings(1e-2, 0.9, 0.95, 1e-6, 0.1, 1.0).update(step)
    squares_1 = np.array([float(np.sum(gradient_P.astype(np.float64) ** 2))])
    yield Call("add_sum_of_squares", (gradient_P, np.ones(1)))
    yield Call("adamw_in_place", (*state, squares_1, np.zeros(3), np.zeros(1), update_8))
