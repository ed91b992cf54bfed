"""Vectors of sums, linear maps, the embedding and the quantisers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mhmoe_np.audit.operation_checks import QUANTIZATIONS, quantised_weight
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector, present
from mhmoe_np.operations.packing import FORMATS
from mhmoe_np.operations.table import Operations, Quantization, Weight
from mhmoe_np.types import FloatArray

# Rows whose largest magnitude is 127 or 63.5: 127/gamma is 1 or 2, and products lie on halves exactly.
HALVES_NI = np.array(
    [
        [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5],
        [-63.5, 0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 63.25],
    ],
    np.float32,
)
# mean|W| is 1, so weights of 0.5 lie between 0 and 1; the mean is 0, so zeros lie on the sign's edge.
EDGES_OI = np.array(
    [
        [0.5, -0.5, 1.5, -1.5, 0.5, -0.5, 1.5, -1.5],
        [0, 0, 2, -2, 1, -1, 1, -1],
        [1.5, -1.5, 0.5, -0.5, 0, 0, 2, -2],
    ],
    np.float32,
)


def linear_vectors() -> Iterator[Vector]:
    """Everything of this file."""
    yield from _sums()
    yield from _linear()
    yield from _bit_linear()
    yield from _embedding()
    yield from _quantise_rows()
    yield from _quantise_weight()
    yield from _pack()


# ---- sums ------------------------------------------------------------------------------------


def add_in_place(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.add_in_place`."""
    onto_ND = given["onto_ND"]
    ops.add_in_place(given["x_ND"], onto_ND)
    return Outcome({"onto_ND.after": onto_ND}, {})


def add_sum(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.add_sum`."""
    total_1 = given["total_1"]
    ops.add_sum(given["x_N"], total_1)
    return Outcome({"total_1.after": total_1}, {})


def _sums() -> Iterator[Vector]:
    draw = Draw("add_in_place")
    yield Vector(
        "add_in_place/plain",
        "A residual.",
        add_in_place,
        {"x_ND": draw(4, 5), "onto_ND": draw(4, 5)},
    )
    yield Vector(
        "add_sum/plain",
        "A sum that goes on from 3.",
        add_sum,
        {"x_N": Draw("add_sum")(50), "total_1": np.array([3.0])},
    )


# ---- linear maps -----------------------------------------------------------------------------


def linear(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.linear` and its backward.

    With the option `quantization` a BitLinear: each `matrix_rows` rows of w_OI are a matrix with a
    scale of its own.
    """
    x_NI, w_OI, b_O = given["x_NI"], given["w_OI"], given.get("b_O")
    acting_OI: Weight = w_OI
    if "quantization" in options:
        acting_OI = quantised_weight(ops, w_OI, options["matrix_rows"], options["quantization"])
    y_NO = ops.linear(x_NI, acting_OI, b_O)
    dw_OI, db_O = np.zeros_like(w_OI), None if b_O is None else np.zeros_like(b_O)
    dx_NI = ops.linear_backward(given["dy_NO"], x_NI, acting_OI, dw_OI, db_O)
    return Outcome({"y_NO": y_NO}, present({"dx_NI": dx_NI, "dw_OI": dw_OI, "db_O": db_O}))


def _linear() -> Iterator[Vector]:
    draw = Draw("linear")
    yield Vector(
        "linear/plain",
        "With a bias.",
        linear,
        {"x_NI": draw(7, 5), "w_OI": draw(6, 5), "b_O": draw(6)},
        {"dy_NO": draw(7, 6)},
    )
    yield Vector(
        "linear/one-row",
        "One token, no bias.",
        linear,
        {"x_NI": draw(1, 9), "w_OI": draw(4, 9)},
        {"dy_NO": draw(1, 4)},
    )
    yield Vector(
        "linear/extreme",
        "Activations about a million, weights about a thousandth.",
        linear,
        {"x_NI": draw(3, 8, scale=1e6), "w_OI": draw(5, 8, scale=1e-3)},
        {"dy_NO": draw(3, 5)},
    )


def _bit_linear() -> Iterator[Vector]:
    for quantization in QUANTIZATIONS:
        draw = Draw(f"linear/{quantization}")
        yield Vector(
            f"linear/{quantization}",
            "A BitLinear of two joined matrices, which have a scale each.",
            linear,
            {"x_NI": draw(6, 24), "w_OI": draw(10, 24)},
            {"dy_NO": draw(6, 10)},
            {"quantization": quantization, "matrix_rows": 5},
        )
        yield Vector(
            f"linear/{quantization}-ties",
            "Activations that come to halves exactly; weights on the quantiser's edge.",
            linear,
            {"x_NI": HALVES_NI, "w_OI": EDGES_OI},
            {"dy_NO": draw(2, 3)},
            {"quantization": quantization, "matrix_rows": 3},
        )
        yield Vector(
            f"linear/{quantization}-zeros",
            "A row of zeros, a row below the smallest scale, and a matrix of zeros.",
            linear,
            {"x_NI": _zero_rows(draw), "w_OI": np.concatenate([draw(4, 8), draw(4, 8, scale=0)])},
            {"dy_NO": draw(3, 8)},
            {"quantization": quantization, "matrix_rows": 4},
        )
        yield Vector(
            f"linear/{quantization}-extreme",
            "Rows about a million, weights about a thousandth.",
            linear,
            {"x_NI": draw(3, 16, scale=1e6), "w_OI": draw(5, 16, scale=1e-3)},
            {"dy_NO": draw(3, 5)},
            {"quantization": quantization, "matrix_rows": 5},
        )


def _zero_rows(draw: Draw) -> FloatArray:
    """Zeros, numbers below 1e-5, ordinary ones."""
    return np.concatenate([draw(1, 8, scale=0), draw(1, 8, scale=2e-6), draw(1, 8)])


# ---- embedding -------------------------------------------------------------------------------


def embedding(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.embedding` and its backward."""
    id_N, w_VD = given["id_N"], given["w_VD"]
    dw_VD = np.zeros_like(w_VD)
    ops.embedding_backward(given["dx_ND"], id_N, dw_VD)
    return Outcome({"x_ND": ops.embedding(id_N, w_VD)}, {"dw_VD": dw_VD})


def _embedding() -> Iterator[Vector]:
    draw = Draw("embedding")
    yield Vector(
        "embedding/plain",
        "Ids that occur more than once, and some that never do.",
        embedding,
        {"id_N": np.array([3, 0, 3, 6, 3, 0, 1]), "w_VD": draw(8, 5)},
        {"dx_ND": draw(7, 5)},
    )
    yield Vector(
        "embedding/one-token",
        "The last id of the vocabulary.",
        embedding,
        {"id_N": np.array([3]), "w_VD": draw(4, 6)},
        {"dx_ND": draw(1, 6)},
    )


# ---- quantisers ------------------------------------------------------------------------------


def quantise_rows(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.quantise_rows`."""
    q_NI, scale_N = ops.quantise_rows(given["x_NI"])
    return Outcome({"q_NI": q_NI, "scale_N": scale_N}, {})


def _quantise_rows() -> Iterator[Vector]:
    draw = Draw("quantise_rows")
    cases = {
        "plain": ("Rows of one size.", draw(6, 20)),
        "ties": ("Halves exactly, rounded to even.", HALVES_NI),
        "zeros": ("A row of zeros and rows below the smallest scale.", _zero_rows(draw)[:2]),
        "extreme": ("Rows about a million.", draw(3, 20, scale=1e6)),
        "one-row": ("One row of one number.", draw(1, 1)),
    }
    for name, (about, x_NI) in cases.items():
        yield Vector(f"quantise_rows/{name}", about, quantise_rows, {"x_NI": x_NI})


def quantise_weight(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.quantise_weight`, without its report."""
    w_OI, starts = given["w_OI"], options["starts"]
    quantization: Quantization = options["quantization"]
    q_OI, beta_O = np.zeros_like(w_OI), np.zeros(len(w_OI), w_OI.dtype)
    ops.quantise_weight(
        w_OI,
        tuple(starts),
        quantization=quantization,
        q_OI=q_OI,
        beta_O=beta_O,
        report_X5=np.zeros((len(starts) - 1, 5)),
    )
    return Outcome({"q_OI": q_OI, "beta_O": beta_O}, {})


def _quantise_weight() -> Iterator[Vector]:
    for quantization in QUANTIZATIONS:
        draw = Draw(f"quantise_weight/{quantization}")
        cases = {
            "": ("Three joined matrices of different heights.", draw(9, 12), [0, 1, 4, 9]),
            "-ties": ("Weights of half the scale, and of the mean exactly.", EDGES_OI, [0, 3]),
            "-zeros": (
                "A matrix of zeros, and one below the smallest scale.",
                np.concatenate([draw(2, 6, scale=0), draw(2, 6, scale=2e-6)]),
                [0, 2, 4],
            ),
        }
        for name, (about, w_OI, starts) in cases.items():
            yield Vector(
                f"quantise_weight/{quantization}{name}",
                about,
                quantise_weight,
                {"w_OI": w_OI},
                options={"quantization": quantization, "starts": starts},
            )


def pack(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.pack_in_place`: the bytes of packed files."""
    q_EOI = given["q_EOI"]
    E, O, I = q_EOI.shape
    packed = ops.empty_packed(E, O, I, options["format"])
    ops.pack_in_place(q_EOI, packed)
    return Outcome({"code": ops.packed_to_host(packed).code}, {})


def _pack() -> Iterator[Vector]:
    for name, (_, _, base, lowest, step) in FORMATS.items():
        for case, (outputs, inputs) in {"plain": (16, 40), "ragged": (19, 37)}.items():
            integer_EOI = Draw(f"pack/{name}/{case}").integers(base, 2, outputs, inputs)
            yield Vector(
                f"pack/{name}-{case}",
                "Two matrices; ragged: sizes that fill no panel and no group.",
                pack,
                {"q_EOI": (lowest + step * integer_EOI).astype(np.float32)},
                options={"format": name},
            )
