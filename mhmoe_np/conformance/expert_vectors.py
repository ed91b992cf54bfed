"""Vectors of the router, the dispatch and the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mhmoe_np.audit.operation_checks import ACTIVATIONS, QUANTIZATIONS, quantised_weight
from mhmoe_np.conformance.block_vectors import EPS
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector, present
from mhmoe_np.operations.table import Operations, RouterLosses, RouterSums, Weight
from mhmoe_np.types import FloatArray, IntArray


def expert_vectors() -> Iterator[Vector]:
    """Everything of this file."""
    yield from _route()
    yield from _router_statistics()
    yield from _dispatch()
    yield from _expert_ffn()


# ---- router ----------------------------------------------------------------------------------


def route(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.route` and its backward.

    Besides the gates two results receive gradients: the balance loss aux, by daux, and the z-loss, by
    dz, both over the counted sub-tokens; count_E, a constant, stands in aux's shares.
    """
    counted_M, count_E = given["counted_M"], given["count_E"]
    normalise = options["normalise"]
    routing = ops.route(given["logits_ME"], top_k=options["top_k"], normalise=normalise)
    losses = RouterLosses(
        count_E.astype(np.float64),
        choices=int(count_E.sum()),
        sub_tokens=int(np.count_nonzero(counted_M)),
        daux=float(given["daux"]),
        dz=float(given["dz"]),
    )
    dlogits_ME = ops.route_backward(given["dgate_MK"], routing, counted_M, losses, normalise=normalise)
    return Outcome(routing._asdict(), {"dlogits_ME": dlogits_ME})


def _route() -> Iterator[Vector]:
    draw = Draw("route")
    tied_ME = np.array([[1, 2, 2, 0, 2], [0, 0, 0, 0, 0], [3, 1, 3, 3, 1]], np.float32)
    cases: dict[str, tuple[str, FloatArray, int, bool]] = {
        "raw": ("Gates are the probabilities.", draw(9, 6), 2, False),
        "normalised": ("Gates are divided by their sum.", draw(9, 6), 2, True),
        "one-choice": ("One expert for each sub-token.", draw(9, 6), 1, False),
        "all-experts": ("Every expert is chosen, the most probable first.", draw(9, 5), 5, True),
        "one-expert": ("Nothing to choose.", draw(4, 1), 1, False),
        "one-sub-token": ("One row.", draw(1, 6), 2, True),
        "ties": ("Equal logits: the lower index first.", tied_ME, 2, True),
        "ties-raw": ("The same with raw gates of three choices.", tied_ME, 3, False),
        "extreme": ("Logits about a thousand, some far below.", _far_logits(draw), 2, True),
    }
    for name, (about, logits_ME, top_k, normalise) in cases.items():
        M, E = logits_ME.shape
        yield Vector(
            f"route/{name}",
            about,
            route,
            {
                "logits_ME": logits_ME,
                "counted_M": np.arange(M) % 3 != 1,
                "count_E": 1 + draw.integers(8, E),
            },
            {
                "dgate_MK": draw(M, top_k),
                "daux": np.array(0.75, np.float32),
                "dz": np.array(0.375, np.float32),
            },
            {"top_k": top_k, "normalise": normalise},
        )


def _far_logits(draw: Draw) -> FloatArray:
    """Two experts near each other at a thousand; the others so low that their weight is almost 0."""
    logits_ME = 1000 + draw(6, 5)
    logits_ME[:, 2:] -= 70
    logits_ME[3:] *= -1
    return np.ascontiguousarray(logits_ME[:, ::-1])


def router_statistics(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.add_router_statistics` of what `route` and `dispatch` make of the logits."""
    logits_ME = given["logits_ME"]
    E = logits_ME.shape[1]
    routing = ops.route(logits_ME, top_k=options["top_k"], normalise=options["normalise"])
    dispatch = ops.dispatch(routing.expert_MK, experts=E, capacity=options["capacity"])
    sums = RouterSums(np.zeros(E), np.zeros(E), np.zeros(E), np.zeros(E), np.zeros(1))
    ops.add_router_statistics(routing, dispatch, given["counted_M"], sums)
    # Held in float64, as exact as the probabilities are.
    return Outcome({name: sum.astype(logits_ME.dtype) for name, sum in sums._asdict().items()}, {})


def _router_statistics() -> Iterator[Vector]:
    for name, about, capacity in (
        ("dropless", "Every sub-token counts but each third.", None),
        ("drops", "Choices beyond a capacity of 2 are counted as dropped.", 2),
    ):
        draw = Draw(f"router_statistics/{name}")
        yield Vector(
            f"router_statistics/{name}",
            about,
            router_statistics,
            {"logits_ME": draw(9, 4), "counted_M": np.arange(9) % 3 != 1},
            options={"top_k": 2, "normalise": True, "capacity": capacity},
        )


# ---- dispatch --------------------------------------------------------------------------------


def dispatch(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.dispatch`."""
    found = ops.dispatch(given["expert_MK"], experts=options["experts"], capacity=options["capacity"])
    return Outcome(found._asdict(), {})


def _dispatch() -> Iterator[Vector]:
    draw = Draw("dispatch")
    for name, about, expert_MK, experts, capacity in (
        ("plain", "Dropless.", draw.choices(8, 5, 2), 5, None),
        ("drops", "At most three rows an expert, first choices before second ones.", _crowd(), 4, 3),
        ("empty-experts", "Experts that nobody chose.", 2 + draw.choices(6, 2, 2), 6, None),
        ("one-sub-token", "One row, capacity 1.", draw.choices(1, 5, 3), 5, 1),
    ):
        yield Vector(
            f"dispatch/{name}",
            about,
            dispatch,
            {"expert_MK": expert_MK},
            options={"experts": experts, "capacity": capacity},
        )


def _crowd() -> IntArray:
    """Seven sub-tokens; expert 2 is the first choice of five and the second of the others."""
    return np.array([[2, 0], [2, 1], [0, 2], [2, 3], [2, 0], [1, 2], [2, 0]])


# ---- experts ---------------------------------------------------------------------------------


def expert_ffn(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.expert_ffn` and its backward, of choices that `dispatch` sorted.

    With the option `quantization` every gate, up and down is a BitLinear with a scale of its own.
    """
    x_MU, gate_MK, sub_norm_EF = given["x_MU"], given["gate_MK"], given.get("sub_norm_EF")
    gate_up_E2FU, down_EUF = given["gate_up_E2FU"], given["down_EUF"]
    E, U, F = down_EUF.shape
    found = ops.dispatch(given["expert_MK"], experts=E, capacity=options["capacity"])
    acting_E2FU: Weight = gate_up_E2FU
    acting_EUF: Weight = down_EUF
    if "quantization" in options:
        acting_E2FU = quantised_weight(ops, gate_up_E2FU, F, options["quantization"])
        acting_EUF = quantised_weight(ops, down_EUF, U, options["quantization"])
    forward = x_MU, gate_MK, found, acting_E2FU, acting_EUF, sub_norm_EF
    activation = options["activation"]
    y_MU, cache = ops.expert_ffn(*forward, activation=activation, eps=options["eps"])
    dgate_up_E2FU, ddown_EUF = np.zeros_like(gate_up_E2FU), np.zeros_like(down_EUF)
    dsub_norm_EF = None if sub_norm_EF is None else np.zeros_like(sub_norm_EF)
    dx_MU, dgate_MK = ops.expert_ffn_backward(
        given["dy_MU"],
        *forward,
        cache,
        dgate_up_E2FU,
        ddown_EUF,
        dsub_norm_EF,
        activation=activation,
    )
    gradients = {
        "dx_MU": dx_MU,
        "dgate_MK": dgate_MK,
        "dgate_up_E2FU": dgate_up_E2FU,
        "ddown_EUF": ddown_EUF,
        "dsub_norm_EF": dsub_norm_EF,
    }
    return Outcome({"y_MU": y_MU}, present(gradients))


def _expert_ffn() -> Iterator[Vector]:
    for activation in ACTIVATIONS:
        yield _experts(activation, "Dropless.", activation=activation)
        yield _experts(
            f"{activation}-sub-norm",
            "A norm before each expert's down projection.",
            activation=activation,
            normed=True,
        )
    drops: dict[str, Any] = {"expert_MK": _crowd(), "capacity": 3, "experts": 4}
    yield _experts("drops", "Choices beyond the capacity add nothing.", **drops)
    empty: dict[str, Any] = {"expert_MK": 2 + Draw("expert_ffn/empty").choices(6, 2, 2)}
    yield _experts("empty-experts", "Experts without a row: their gradients are 0.", **empty)
    one: dict[str, Any] = {"expert_MK": np.array([[4, 1]])}
    yield _experts("one-sub-token", "One row, two experts.", **one)
    yield _experts("one-choice", "One expert for each row.", top_k=1)
    yield _experts("extreme", "Activations about a thousand.", scale=1e3)
    for quantization in QUANTIZATIONS:
        yield _experts(quantization, "BitLinears.", quantization=quantization)
        yield _experts(
            f"{quantization}-relu2-sub-norm-drops",
            "BitLinears, squared ReLU, a sub-norm, and a capacity.",
            activation="relu2",
            normed=True,
            quantization=quantization,
            **drops,
        )


def _experts(
    case: str,
    about: str,
    *,
    activation: str = "silu",
    normed: bool = False,
    expert_MK: IntArray | None = None,
    experts: int = 6,
    top_k: int = 2,
    capacity: int | None = None,
    scale: float = 1.0,
    quantization: str | None = None,
) -> Vector:
    """The choices are drawn unless they are given."""
    name, U, F = f"expert_ffn/{case}", 8, 5
    draw = Draw(name)
    if expert_MK is None:
        expert_MK = draw.choices(7, experts, top_k)
    M, K = expert_MK.shape
    arguments = {
        "x_MU": draw(M, U, scale=scale),
        "gate_MK": draw(M, K),
        "expert_MK": expert_MK,
        "gate_up_E2FU": draw(experts, 2 * F, U),
        "down_EUF": draw(experts, U, F),
    }
    if normed:
        arguments["sub_norm_EF"] = draw(experts, F)
    options: dict[str, Any] = {"activation": activation, "eps": EPS, "capacity": capacity}
    if quantization is not None:
        options["quantization"] = quantization
    return Vector(name, about, expert_ffn, arguments, {"dy_MU": draw(M, U)}, options)
