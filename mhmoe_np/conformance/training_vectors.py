"""Vectors of the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mhmoe_np.audit.operation_checks import IGNORED
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.types import FloatArray


def training_vectors() -> Iterator[Vector]:
    """Everything of this file."""
    yield from _token_nll()
    yield from _sum_of_squares()
    yield from _adamw()


# ---- loss ------------------------------------------------------------------------------------


def token_nll(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.token_nll`; its backward where every counted token's NLL receives dnll."""
    x_ND, w_VD, target_N = given["x_ND"], given["w_VD"], given["target_N"]
    dw_VD = np.zeros_like(w_VD)
    _, dx_ND = ops.token_nll_and_gradient(x_ND, w_VD, target_N, dw_VD, dnll=float(given["dnll"]))
    return Outcome({"nll_N": ops.token_nll(x_ND, w_VD, target_N)}, {"dx_ND": dx_ND, "dw_VD": dw_VD})


def _token_nll() -> Iterator[Vector]:
    draw = Draw("token_nll")
    ignored = [3, IGNORED, 10, 0, 7, IGNORED, 3, IGNORED]
    cases: dict[str, tuple[str, list[int], float]] = {
        "plain": ("Targets of -100 count nothing.", ignored, 1),
        "one-token": ("One target, the last id.", [10], 1),
        "none-but-one": ("One target among padding.", [IGNORED, IGNORED, 4, IGNORED], 1),
        "extreme": ("Logits of some hundreds.", [3, 9, 10, 0], 60),
    }
    for name, (about, targets, scale) in cases.items():
        yield Vector(
            f"token_nll/{name}",
            about,
            token_nll,
            {
                "x_ND": draw(len(targets), 6, scale=scale),
                "w_VD": draw(11, 6),
                "target_N": np.array(targets),
            },
            {"dnll": np.array(0.375, np.float32)},
        )


# ---- optimiser -------------------------------------------------------------------------------


def sum_of_squares(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`Operations.add_sum_of_squares`."""
    total_1 = given["total_1"]
    ops.add_sum_of_squares(given["x_P"], total_1)
    return Outcome({"total_1.after": total_1}, {})


def _sum_of_squares() -> Iterator[Vector]:
    yield Vector(
        "sum_of_squares/plain",
        "A sum that goes on from 3.",
        sum_of_squares,
        {"x_P": Draw("sum_of_squares")(60), "total_1": np.array([3.0])},
    )


def adamw(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """One `Operations.adamw_in_place`, clipped by the gradient's own norm.

    The options are `AdamWSettings` and the step, which counts from 1.
    """
    parameter_P, gradient_P = given["parameter_P"], given["gradient_P"]
    first_moment_P, second_moment_P = given["first_moment_P"], given["second_moment_P"]
    squares_1, left_out_1 = np.zeros(1), np.zeros(1)
    ops.add_sum_of_squares(gradient_P, squares_1)
    settings = AdamWSettings(*(options[field] for field in AdamWSettings._fields))
    ops.adamw_in_place(
        parameter_P,
        gradient_P,
        first_moment_P,
        second_moment_P,
        squares_1,
        given["guard"],
        left_out_1,
        settings.update(options["step"]),
    )
    results = {
        "squares_1": squares_1,
        "parameter_P.after": parameter_P,
        "gradient_P.after": gradient_P,
        "first_moment_P.after": first_moment_P,
        "second_moment_P.after": second_moment_P,
        "left_out_1": left_out_1,
    }
    return Outcome(results, {})


def _adamw() -> Iterator[Vector]:
    draw = Draw("adamw")
    nothing: FloatArray = draw(12, scale=0)
    cases: dict[str, tuple[str, FloatArray, float, int, float]] = {
        "first-step": ("Moments are 0; the norm is below the clipping norm.", draw(12), 100.0, 1, 0),
        "later-step": ("Moments of ninety-nine steps.", draw(12), 100.0, 100, 0),
        "clipped": ("The gradient's norm is above the clipping norm.", draw(12, scale=9), 0.5, 7, 0),
        "no-gradient": ("A gradient of 0: moments fade, the decay goes on.", nothing, 1.0, 7, 0),
        "guarded": ("A guard that is not finite: nothing changes.", draw(12), 1.0, 7, np.inf),
    }
    for name, (about, gradient_P, clip_norm, step, guard) in cases.items():
        moments = 0.0 if step == 1 else 0.25
        settings = AdamWSettings(
            learning_rate=2.0**-9,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-6,
            weight_decay=0.1,
            clip_norm=clip_norm,
        )
        yield Vector(
            f"adamw/{name}",
            about,
            adamw,
            {
                "parameter_P": draw(12),
                "gradient_P": gradient_P,
                "first_moment_P": draw(12, scale=moments),
                "second_moment_P": draw(12, scale=moments) ** 2,
                "guard": np.array([1.0, guard]),
            },
            options={**settings._asdict(), "step": step},
        )
