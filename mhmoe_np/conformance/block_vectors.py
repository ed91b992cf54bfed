"""Vectors of a block between its linear maps: norms, rotary positions, attention, activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mhmoe_np.audit.operation_checks import ACTIVATIONS
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector
from mhmoe_np.layers.rotary import rotary_tables
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray

EPS = 1e-5


def block_vectors() -> Iterator[Vector]:
    """Everything of this file."""
    yield from _rms_norm()
    yield from _rotate()
    yield from _attention()
    yield from _gated_activation()


# ---- norms -----------------------------------------------------------------------------------


def rms_norm(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.rms_norm` and its backward."""
    x_ND, w_D = given["x_ND"], given["w_D"]
    y_ND, rstd_N = ops.rms_norm(x_ND, w_D, eps=options["eps"])
    dw_D = np.zeros_like(w_D)
    dx_ND = ops.rms_norm_backward(given["dy_ND"], x_ND, w_D, rstd_N, dw_D)
    return Outcome({"y_ND": y_ND, "rstd_N": rstd_N}, {"dx_ND": dx_ND, "dw_D": dw_D})


def add_and_norm(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.add_in_place_and_norm`; the sum receives a gradient of its own besides the norm's.

    The gradient of x is that of branch.
    """
    branch_ND, w_D = given["branch_ND"], given["w_D"]
    y_ND, rstd_N = ops.add_in_place_and_norm(given["x_ND"], branch_ND, w_D, eps=options["eps"])
    dw_D, onto_ND = np.zeros_like(w_D), given["dbranch_ND.after"]
    dx_ND = ops.rms_norm_backward(given["dy_ND"], branch_ND, w_D, rstd_N, dw_D, onto_ND=onto_ND)
    results = {"branch_ND.after": branch_ND, "y_ND": y_ND, "rstd_N": rstd_N}
    return Outcome(results, {"dx_ND": dx_ND, "dw_D": dw_D})


def _rms_norm() -> Iterator[Vector]:
    draw = Draw("rms_norm")
    cases = {
        "plain": ("A weight that is not 1.", draw(6, 8)),
        "one-token": ("One row.", draw(1, 8)),
        "small": ("Rows whose mean square is below eps.", draw(4, 8, scale=1e-3)),
        "zeros": ("A row of zeros.", draw(1, 8, scale=0)),
        "extreme": ("Activations about a million.", draw(4, 8, scale=1e6)),
    }
    for name, (about, x_ND) in cases.items():
        yield Vector(
            f"rms_norm/{name}",
            about,
            rms_norm,
            {"x_ND": x_ND, "w_D": draw(8)},
            {"dy_ND": draw(*x_ND.shape)},
            {"eps": EPS},
        )
    yield Vector(
        "rms_norm/with-residual",
        "branch += x, then the norm of that sum, which goes on as the residual stream.",
        add_and_norm,
        {"x_ND": draw(6, 8), "branch_ND": draw(6, 8), "w_D": draw(8)},
        {"dbranch_ND.after": draw(6, 8), "dy_ND": draw(6, 8)},
        {"eps": EPS},
    )


# ---- attention -------------------------------------------------------------------------------


def rotate(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.rotate_in_place`, there and, by the opposite angle, back.

    The angles are those of `rotary_tables` with the options; first_1 is the first position.
    """
    x_BTAC, dx_BTAC, first_1 = given["x_BTAC"], given["dx_BTAC.after"], given["first_1"]
    cos_YJ, sin_YJ, minus_sin_YJ, _ = rotary_tables(
        options["positions"], x_BTAC.shape[3], options["rope_theta"], x_BTAC.dtype, ops=ops
    )
    ops.rotate_in_place(x_BTAC, cos_YJ, sin_YJ, first_1)
    ops.rotate_in_place(dx_BTAC, cos_YJ, minus_sin_YJ, first_1)
    return Outcome({"x_BTAC.after": x_BTAC}, {"dx_BTAC": dx_BTAC})


def _rotate() -> Iterator[Vector]:
    draw = Draw("rotate")
    for name, about, first in (
        ("plain", "Positions 0 to 4.", 0),
        ("later", "Positions 7 to 11, as when tokens are decoded behind others.", 7),
    ):
        yield Vector(
            f"rotate/{name}",
            about,
            rotate,
            {"x_BTAC": draw(2, 5, 3, 6), "first_1": np.array([first])},
            {"dx_BTAC.after": draw(2, 5, 3, 6)},
            {"rope_theta": 100.0, "positions": 12},
            (rotary_tables,),
        )


def attention(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.attention`; and its backward, where there are as many queries as keys."""
    qkv = given["q_BTAC"], given["k_BSGC"], given["v_BSGC"]
    out_BTAC, log_sum_exp_BAT = ops.attention(*qkv)
    results = {"out_BTAC": out_BTAC, "log_sum_exp_BAT": log_sum_exp_BAT}
    if "dout_BTAC" not in given:
        return Outcome(results, {})
    gradients = dict(
        zip(("dq_BTAC", "dk_BSGC", "dv_BSGC"), (np.zeros_like(part) for part in qkv), strict=True)
    )
    ops.attention_backward(given["dout_BTAC"], *qkv, out_BTAC, log_sum_exp_BAT, *gradients.values())
    return Outcome(results, gradients)


def attention_with_cache(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.attention_with_cache`."""
    kv_BS2GC = given["kv_BS2GC"]
    out_BTAC = ops.attention_with_cache(
        given["q_BTAC"], given["k_BTGC"], given["v_BTGC"], kv_BS2GC, given["filled_1"]
    )
    return Outcome({"out_BTAC": out_BTAC, "kv_BS2GC.after": kv_BS2GC}, {})


def _attention() -> Iterator[Vector]:
    draw = Draw("attention")
    for name, about, (T, S, A, G), scale in (
        ("plain", "A key/value head for each attention head.", (5, 5, 3, 3), 1),
        ("grouped", "Two attention heads share each key/value head.", (5, 5, 4, 2), 1),
        ("one-key-value-head", "All attention heads share one.", (6, 6, 4, 1), 1),
        ("one-position", "The only key gets all the weight.", (1, 1, 4, 2), 1),
        ("behind-others", "Two queries, the last of seven positions: no backward.", (2, 7, 4, 2), 1),
        ("extreme", "Scores of some tens: weights of almost 0 and almost 1.", (5, 5, 4, 2), 4),
    ):
        yield Vector(
            f"attention/{name}",
            about,
            attention,
            {
                "q_BTAC": draw(2, T, A, 6, scale=scale),
                "k_BSGC": draw(2, S, G, 6, scale=scale),
                "v_BSGC": draw(2, S, G, 6),
            },
            {"dout_BTAC": draw(2, T, A, 6)} if T == S else {},
        )
    for name, T, filled in (("first", 3, 0), ("step", 1, 4)):
        yield Vector(
            f"attention_with_cache/{name}",
            "Keys and values go into the cache behind those that it holds; the others stay.",
            attention_with_cache,
            {
                "q_BTAC": draw(2, T, 4, 6),
                "k_BTGC": draw(2, T, 2, 6),
                "v_BTGC": draw(2, T, 2, 6),
                "kv_BS2GC": draw(2, 8, 4, 6),
                "filled_1": np.array([filled]),
            },
        )


# ---- activations -----------------------------------------------------------------------------


def gated_activation(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.gated_activation` and its backward."""
    gate_up_N2F, activation = given["gate_up_N2F"], options["activation"]
    h_NF = ops.gated_activation(gate_up_N2F, activation=activation)
    dgate_up_N2F = ops.gated_activation_backward(given["dh_NF"], gate_up_N2F, activation=activation)
    return Outcome({"h_NF": h_NF}, {"dgate_up_N2F": dgate_up_N2F})


def _gated_activation() -> Iterator[Vector]:
    for activation in ACTIVATIONS:
        draw = Draw(f"gated_activation/{activation}")
        cases = {
            "": ("Gates of both signs.", draw(6, 10)),
            "-extreme": ("Gates of 0 and of either sign up to a thousand.", _extreme_gates(draw)),
        }
        for name, (about, gate_up_N2F) in cases.items():
            yield Vector(
                f"gated_activation/{activation}{name}",
                about,
                gated_activation,
                {"gate_up_N2F": gate_up_N2F},
                {"dh_NF": draw(len(gate_up_N2F), gate_up_N2F.shape[1] // 2)},
                {"activation": activation},
            )


def _extreme_gates(draw: Draw) -> FloatArray:
    """One row: gates, then ups of ordinary size."""
    gates = np.array([0, 1000, -1000, 90, -90, 30, -30], np.float32)
    return np.concatenate([gates, draw(len(gates))])[None]
