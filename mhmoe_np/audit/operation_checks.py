"""Every differentiable operation of the table: its backward against derivatives of its forward.

A case is one operation at one point, its arguments by the table's names. The functions that make cases
take sizes: tests choose others than `check_operations`.

A quantiser has no derivative: the straight-through gradients of quantised weights are compared with the
derivatives of the surrogate whose gradients they are (see `surrogate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_np.audit.derivative import GradientCheck, check_gradients
from mhmoe_np.audit.surrogate import ActingWeight, Surrogate
from mhmoe_np.operations.table import (
    Activation,
    BitWeight,
    Operations,
    Quantization,
    RouterLosses,
    Weight,
)
from mhmoe_np.types import FloatArray

OPERATION_BOUND = 1e-7
DIRECTIONS = 3  # for each argument
ACTIVATIONS: tuple[Activation, ...] = ("silu", "relu2")
QUANTIZATIONS: tuple[Quantization, ...] = ("bitnet_b158", "bitnet")
EPS = 1e-5
IGNORED = -100

Arrays = Mapping[str, FloatArray]
Outputs = Sequence[FloatArray]


class Case(NamedTuple):
    """One operation at one point.

    run: the outputs that the arguments give.
    back: the gradient of every argument, given those of the outputs.
    """

    name: str
    arguments: Arrays
    run: Callable[[Arrays], Outputs]
    back: Callable[[Outputs], dict[str, FloatArray]]


def check(case: Case, rng: np.random.Generator) -> GradientCheck:
    """Every argument's gradient, given random gradients of the outputs."""
    outputs = [y.copy() for y in case.run(case.arguments)]
    upstream = [rng.standard_normal(y.shape) for y in outputs]

    def value(argument: str, moved: FloatArray) -> float:
        now = case.run({**case.arguments, argument: moved})
        # Minus the outputs at the point: a constant changes no derivative and costs digits.
        return sum(
            float(np.sum((y - y0) * dy)) for y, y0, dy in zip(now, outputs, upstream, strict=True)
        )

    size = sum(float(np.sum(np.abs(y0 * dy))) for y0, dy in zip(outputs, upstream, strict=True))
    return check_gradients(
        case.name,
        value,
        case.arguments,
        case.back(upstream),
        rounding=float(np.spacing(size)),
        directions=DIRECTIONS,
        bound=OPERATION_BOUND,
        rng=rng,
    )


def check_operations(ops: Operations) -> Iterator[GradientCheck]:
    """Every differentiable operation; `ops` take NumPy's arrays (see `host_facing.on_host`)."""
    rng = np.random.default_rng(0)
    for case in cases(ops, rng):
        yield check(case, rng)


def cases(ops: Operations, rng: np.random.Generator) -> Iterator[Case]:
    """A case or more of every differentiable operation."""
    yield linear(ops, rng)
    yield embedding(ops, rng)
    yield rms_norm(ops, rng)
    yield rotate(ops, rng)
    yield attention(ops, rng)
    for activation in ACTIVATIONS:
        yield gated_activation(ops, rng, activation=activation)
    for normalise in (False, True):
        yield route(ops, rng, normalise=normalise)
    for activation in ACTIVATIONS:
        for normed in (False, True):
            yield expert_ffn(ops, rng, activation=activation, normed=normed)
    for quantization in QUANTIZATIONS:
        yield linear(ops, rng, quantization=quantization)
        for activation in ACTIVATIONS:
            for normed in (False, True):
                yield expert_ffn(
                    ops, rng, activation=activation, normed=normed, quantization=quantization
                )
    yield token_nll(ops, rng)


class _Sums:
    """What a backward adds the gradients of weights to: not 0 before, so that overwriting shows."""

    def __init__(self, weights: Mapping[str, FloatArray]) -> None:
        self._before = {
            name: np.cos(np.arange(w.size, dtype=w.dtype)).reshape(w.shape)
            for name, w in weights.items()
        }
        self.arrays = {name: before.copy() for name, before in self._before.items()}

    def added(self) -> dict[str, FloatArray]:
        """What the backward added to each."""
        return {name: array - self._before[name] for name, array in self.arrays.items()}


def linear(
    ops: Operations,
    rng: np.random.Generator,
    *,
    rows: int = 7,
    inputs: int = 5,
    outputs: int = 6,
    bias: bool = True,
    quantization: Quantization | None = None,
) -> Case:
    """y = x w^T + b; quantised, w joins two matrices of half its rows each, as in the model."""
    x_NI = rng.standard_normal((rows, inputs))
    weights = {"w_OI": rng.standard_normal((outputs, inputs))}
    if bias:
        weights["b_O"] = rng.standard_normal(outputs)
    w_OI: Weight = weights["w_OI"]
    if quantization is not None:
        w_OI = quantised_weight(ops, weights["w_OI"], outputs // 2, quantization)
    surrogate = Surrogate(ops)

    def run(now: Arrays) -> Outputs:
        surrogate.rewind()
        acting = _acting(w_OI, weights["w_OI"], now["w_OI"])
        return (surrogate.linear(now["x_NI"], acting, now.get("b_O")),)

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        sums = _Sums(weights)
        dw_OI, db_O = sums.arrays["w_OI"], sums.arrays.get("b_O")
        dx_NI = ops.linear_backward(upstream[0], x_NI, w_OI, dw_OI, db_O)
        return {"x_NI": dx_NI, **sums.added()}

    name = "linear" if quantization is None else f"linear[{quantization}]"
    return Case(name, {"x_NI": x_NI, **weights}, run, back)


def embedding(ops: Operations, rng: np.random.Generator, *, rows: int = 9) -> Case:
    """Some ids occur more than once, one never."""
    id_N = rng.integers(0, 4, rows)
    w_VD = rng.standard_normal((5, 3))

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        sums = _Sums({"w_VD": w_VD})
        ops.embedding_backward(upstream[0], id_N, sums.arrays["w_VD"])
        return sums.added()

    return Case("embedding", {"w_VD": w_VD}, lambda now: (ops.embedding(id_N, now["w_VD"]),), back)


def rms_norm(ops: Operations, rng: np.random.Generator, *, rows: int = 7) -> Case:
    """The weight is not 1."""
    x_ND, w_D = rng.standard_normal((rows, 5)), rng.standard_normal(5)

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        sums = _Sums({"w_D": w_D})
        _, rstd_N = ops.rms_norm(x_ND, w_D, eps=EPS)
        dx_ND = ops.rms_norm_backward(upstream[0], x_ND, w_D, rstd_N, sums.arrays["w_D"])
        return {"x_ND": dx_ND, **sums.added()}

    return Case(
        "rms_norm",
        {"x_ND": x_ND, "w_D": w_D},
        lambda now: ops.rms_norm(now["x_ND"], now["w_D"], eps=EPS)[:1],
        back,
    )


def rotate(ops: Operations, rng: np.random.Generator) -> Case:
    """Its backward is the rotation by the opposite angle."""
    x_BTAC, angle_TJ = rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((5, 2))
    cos_TJ, sin_TJ = np.cos(angle_TJ), np.sin(angle_TJ)

    def rotated(x_BTAC: FloatArray, sin_TJ: FloatArray) -> FloatArray:
        turned_BTAC = x_BTAC.copy()
        ops.rotate_in_place(turned_BTAC, cos_TJ, sin_TJ, None)
        return turned_BTAC

    return Case(
        "rotate",
        {"x_BTAC": x_BTAC},
        lambda now: (rotated(now["x_BTAC"], sin_TJ),),
        lambda upstream: {"x_BTAC": rotated(upstream[0], -sin_TJ)},
    )


def attention(
    ops: Operations, rng: np.random.Generator, *, positions: int = 5, heads: tuple[int, int] = (4, 2)
) -> Case:
    """Attention heads and key/value heads; all are views of one array, as in the model."""
    (A, G), B, C = heads, 2, 6
    names = ("q_BTAC", "k_BTGC", "v_BTGC")

    def parts(joint_BTQC: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        return joint_BTQC[:, :, :A], joint_BTQC[:, :, A : A + G], joint_BTQC[:, :, A + G :]

    def joined(now: Arrays) -> tuple[FloatArray, FloatArray, FloatArray]:
        return parts(np.concatenate([now[name] for name in names], axis=2))

    arguments = {
        name: part.copy()
        for name, part in zip(
            names, parts(rng.standard_normal((B, positions, A + 2 * G, C))), strict=True
        )
    }

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        dq_BTAC, dk_BTGC, dv_BTGC = parts(np.full((B, positions, A + 2 * G, C), np.nan))
        qkv = joined(arguments)
        ops.attention_backward(upstream[0], *qkv, *ops.attention(*qkv), dq_BTAC, dk_BTGC, dv_BTGC)
        return dict(zip(names, (dq_BTAC, dk_BTGC, dv_BTGC), strict=True))

    return Case("attention", arguments, lambda now: ops.attention(*joined(now))[:1], back)


def gated_activation(
    ops: Operations, rng: np.random.Generator, *, activation: Activation, rows: int = 7
) -> Case:
    """Gates of both signs."""
    gate_up_N2F = rng.standard_normal((rows, 10))
    return Case(
        f"gated_activation[{activation}]",
        {"gate_up_N2F": gate_up_N2F},
        lambda now: (ops.gated_activation(now["gate_up_N2F"], activation=activation),),
        lambda upstream: {
            "gate_up_N2F": ops.gated_activation_backward(
                upstream[0], gate_up_N2F, activation=activation
            )
        },
    )


def route(
    ops: Operations, rng: np.random.Generator, *, normalise: bool, experts: int = 6, top_k: int = 2
) -> Case:
    """Gates, balance loss and z-loss; about a third of the sub-tokens do not count for the last two.

    The outputs aux = E sum_e c_e / choices * mean p_e and z = mean lse^2 stand for what becomes of the
    router's statistics; the counts c are constants.
    """
    M = 9
    # Well separated: no step of the stencil changes which experts are the largest.
    apart_ME = rng.permuted(np.tile(np.linspace(-1, 1, experts), (M, 1)), axis=1)
    logits_ME = apart_ME + rng.uniform(-0.05, 0.05, (M, experts))
    counted_M = np.arange(M) % 3 != 1
    count_E = rng.integers(1, 9, experts).astype(np.float64)
    choices, sub_tokens = int(count_E.sum()), int(counted_M.sum())

    def run(now: Arrays) -> Outputs:
        routing = ops.route(now["logits_ME"], top_k=top_k, normalise=normalise)
        mean_p_E = routing.p_ME[counted_M].mean(axis=0)
        aux = experts * np.sum(count_E / choices * mean_p_E)
        z = np.mean(routing.log_sum_exp_M[counted_M] ** 2)
        return routing.gate_MK, np.array([aux]), np.array([z])

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        dgate_MK, daux_1, dz_1 = upstream
        losses = RouterLosses(count_E, choices, sub_tokens, daux=float(daux_1[0]), dz=float(dz_1[0]))
        routing = ops.route(logits_ME, top_k=top_k, normalise=normalise)
        return {
            "logits_ME": ops.route_backward(dgate_MK, routing, counted_M, losses, normalise=normalise)
        }

    kind = "normalised" if normalise else "raw"
    return Case(f"route[{kind}]", {"logits_ME": logits_ME}, run, back)


def expert_ffn(
    ops: Operations,
    rng: np.random.Generator,
    *,
    activation: Activation,
    normed: bool,
    capacity: int | None = 3,
    quantization: Quantization | None = None,
) -> Case:
    """All first choices are of one expert, the second ones of any; a capacity drops some of them."""
    M, E, K, U, F = 7, 6, 2, 8, 3
    score_ME = rng.random((M, E))
    score_ME[:, E // 2] += 1
    dispatch = ops.dispatch(np.argsort(-score_ME, axis=1)[:, :K].copy(), experts=E, capacity=capacity)
    weights = {
        "gate_up_E2FU": rng.standard_normal((E, 2 * F, U)),
        "down_EUF": rng.standard_normal((E, U, F)),
    }
    if normed:
        weights["sub_norm_EF"] = rng.standard_normal((E, F))
    arguments = {"x_MU": rng.standard_normal((M, U)), "gate_MK": rng.standard_normal((M, K)), **weights}
    gate_up_E2FU: Weight = weights["gate_up_E2FU"]
    down_EUF: Weight = weights["down_EUF"]
    if quantization is not None:  # gate and up have a scale each, as in the model
        gate_up_E2FU = quantised_weight(ops, weights["gate_up_E2FU"], F, quantization)
        down_EUF = quantised_weight(ops, weights["down_EUF"], U, quantization)
    surrogate = Surrogate(ops)

    def run(now: Arrays) -> Outputs:
        surrogate.rewind()
        y_MU, _ = surrogate.expert_ffn(
            now["x_MU"],
            now["gate_MK"],
            dispatch,
            _acting(gate_up_E2FU, weights["gate_up_E2FU"], now["gate_up_E2FU"]),
            _acting(down_EUF, weights["down_EUF"], now["down_EUF"]),
            now.get("sub_norm_EF"),
            activation=activation,
            eps=EPS,
        )
        return (y_MU,)

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        sums = _Sums(weights)
        given = (
            *(arguments["x_MU"], arguments["gate_MK"], dispatch),
            *(gate_up_E2FU, down_EUF, weights.get("sub_norm_EF")),
        )
        _, cache = ops.expert_ffn(*given, activation=activation, eps=EPS)
        dx_MU, dgate_MK = ops.expert_ffn_backward(
            upstream[0],
            *given,
            cache,
            sums.arrays["gate_up_E2FU"],
            sums.arrays["down_EUF"],
            sums.arrays.get("sub_norm_EF"),
            activation=activation,
        )
        return {"x_MU": dx_MU, "gate_MK": dgate_MK, **sums.added()}

    kinds = [
        *([] if quantization is None else [quantization]),
        activation,
        *(["sub-norm"] if normed else []),
        *([] if capacity is None else ["capacity"]),
    ]
    return Case(f"expert_ffn[{', '.join(kinds)}]", arguments, run, back)


def token_nll(ops: Operations, rng: np.random.Generator) -> Case:
    """The sum over the targets, two of which are not counted."""
    x_ND, w_VD = rng.standard_normal((8, 5)), rng.standard_normal((11, 5))
    target_N = rng.integers(0, 11, 8)
    target_N[[1, 5]] = IGNORED

    def back(upstream: Outputs) -> dict[str, FloatArray]:
        sums = _Sums({"w_VD": w_VD})
        _, dx_ND = ops.token_nll_and_gradient(
            x_ND, w_VD, target_N, sums.arrays["w_VD"], dnll=float(upstream[0][0])
        )
        return {"x_ND": dx_ND, **sums.added()}

    return Case(
        "token_nll",
        {"x_ND": x_ND, "w_VD": w_VD},
        lambda now: (np.array([ops.token_nll(now["x_ND"], now["w_VD"], target_N).sum()]),),
        back,
    )


def quantised_weight(
    ops: Operations, w: FloatArray, matrix_rows: int, quantization: Quantization
) -> BitWeight:
    """Joined matrices of so many rows, each quantised with a beta of its own.

    w: float, [O, I], or [E, O, I] for experts.
    """
    quantised = BitWeight(np.zeros_like(w), np.zeros(w.shape[:-1], w.dtype))
    rows = math.prod(w.shape[:-1])
    starts = tuple(range(0, rows + 1, matrix_rows))
    ops.quantise_weight(
        w.reshape(rows, -1),
        starts,
        quantization=quantization,
        q_OI=quantised.w.reshape(rows, -1),
        beta_O=quantised.beta.reshape(-1),
        report_X5=np.zeros((len(starts) - 1, 5)),
    )
    return quantised


def _acting(weight: Weight, at: FloatArray, moved: FloatArray) -> FloatArray | ActingWeight:
    """What takes the place of a weight whose parameter is moved."""
    return ActingWeight.of(weight, at, moved) if isinstance(weight, BitWeight) else moved
