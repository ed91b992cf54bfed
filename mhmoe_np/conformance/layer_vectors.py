"""Vectors of the MH-MoE layer by itself, the paper's subject."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mhmoe_np.audit.models import BASE, MH2, MH3, SIGN, SMOE, TERNARY
from mhmoe_np.conformance.model_vectors import SMALL, drawn_parameters, filled
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector
from mhmoe_np.layers.moe import moe_backward, moe_forward
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import StepSums, losses_of
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

LAYER = "model.layers.0."
ONE_LAYER = {"num_hidden_layers": 1, "decoder_sparse_step": 1, "router_z_loss_coef": 0.2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "smoe": ("One head, one choice, no head and merge layer.", SMOE),
    "mh2": ("Two heads.", MH2),
    "mh3": ("Three heads, three choices.", MH3),
    "mh2-bias": ("Biases in head and merge layer.", MH2 | {"moe_projection_bias": True}),
    "mh2-residual": ("Each sub-token is added to its experts' output.", MH2 | {"moe_residual": True}),
    "mh2-raw-gates": ("Gates that are not renormalised.", MH2 | {"norm_topk_prob": False}),
    "mh2-neither": (
        "No head and no merge layer.",
        MH2 | {"moe_head_layer": False, "moe_merge_layer": False},
    ),
    "mh2-shared-sub-norm": (
        "A shared expert; sub-norms.",
        MH2 | {"shared_expert_intermediate_size": 9, "use_sub_norm": True},
    ),
    "mh2-capacity": ("A capacity that drops choices.", MH2 | {"moe_capacity_factor": 0.6}),
    "mh2-topk-balance": ("Balance by all choices.", MH2 | {"router_aux_loss_type": "topk"}),
    "mh3-ternary": ("Ternary BitLinears.", MH3 | TERNARY),
    "mh2-sign-projections": (
        "Sign BitLinears, head and merge layer too.",
        MH2 | SIGN | {"quantize_moe_projections": True},
    ),
}


def moe_layer(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`layers.moe`, there and back, with the balance loss and the z-loss of its router.

    The losses count the tokens of counted_N. The gradients are those of the sum of y_ND times dy_ND and
    both losses times their coefficients in the options, a `config.json`.
    """
    config = ModelConfig.model_validate(options)
    x_ND, counted_N = given["x_ND"], given["counted_N"]
    weights = filled(config, given, x_ND.dtype, prefix=LAYER).to_device(ops)
    w = Model.of(weights, ops=ops).weights.blocks[0]
    sums = StepSums(config, ops=ops)
    (tally,) = sums.tallies(ops.to_device(np.repeat(counted_N, config.moe_heads)))
    y_ND, cache = moe_forward(ops.to_device(x_ND), w, tally, drop=True, config=config, ops=ops)

    counted = int(np.count_nonzero(counted_N))
    (losses,) = sums.losses_backward(counted)
    assert losses is not None
    gradient = Parameters(config, x_ND.dtype).to_device(ops)
    dx_ND = moe_backward(
        ops.to_device(given["dy_ND"]), cache, losses, w, gradient.blocks[0], config=config, ops=ops
    )
    total = sums.read(counted, x_ND.dtype).losses
    results = {
        "router_logits": ops.to_host(cache.logits_ME),
        "experts": ops.to_host(cache.routing.expert_MK),
        "y_ND": ops.to_host(y_ND),
        "aux_loss": np.array(total.aux_loss, x_ND.dtype),
        "z_loss": np.array(total.z_loss, x_ND.dtype),
    }
    weights_back = {
        f"grad.{name}": tensor for name, tensor in _of_the_layer(gradient.to_host(ops)).items()
    }
    return Outcome(results, {"dx_ND": ops.to_host(dx_ND), **weights_back})


def _of_the_layer(parameters: Parameters) -> dict[str, FloatArray]:
    """The tensors of the layer, by their names on disk without the layer's prefix."""
    return {
        name.removeprefix(LAYER): tensor
        for name, tensor in parameters.tensors.items()
        if name.startswith(f"{LAYER}mlp.")
    }


def layer_vectors() -> Iterator[Vector]:
    """Configurations, then edges of the two-headed one."""
    for case, (about, own) in CASES.items():
        yield _layer(case, about, own, tokens=7)
    yield _layer("one-token", "One token: two sub-tokens.", MH2, tokens=1)
    yield _large()
    yield _alike()
    yield _tied()


def _layer(case: str, about: str, own: dict[str, Any], *, tokens: int, scale: float = 1.0) -> Vector:
    name = f"moe_layer/{case}"
    config = ModelConfig.model_validate({**BASE, **own, **SMALL, **ONE_LAYER})
    draw = Draw(name)
    return Vector(
        name,
        about,
        moe_layer,
        {
            "x_ND": draw(tokens, config.hidden_size, scale=scale),
            "counted_N": np.arange(tokens) % 3 != 1,
            **_of_the_layer(drawn_parameters(config, name)),
        },
        {"dy_ND": draw(tokens, config.hidden_size)},
        config.model_dump(),
        (moe_forward, moe_backward, losses_of),
    )


def _large() -> Vector:
    """The router's weights are as small as the activations are large."""
    vector = _layer("extreme", "Activations about a thousand.", MH2, tokens=6, scale=1e3)
    gate_EU = vector.arguments["mlp.gate.weight"] / np.float32(1024)
    return vector._replace(arguments={**vector.arguments, "mlp.gate.weight": gate_EU})


def _alike() -> Vector:
    """Tokens alike go to the same experts."""
    vector = _layer(
        "empty-experts", "Tokens alike: most experts are empty.", CASES["mh2-capacity"][1], tokens=6
    )
    x_ND = np.repeat(vector.arguments["x_ND"][:1], 6, axis=0)
    return vector._replace(arguments={**vector.arguments, "x_ND": x_ND})


def _tied() -> Vector:
    """Numbers of few bits, whose products are exact in any order, and rows of the router alike."""
    vector = _layer(
        "ties", "Experts 1, 3 and 4 have the same logits.", CASES["mh2-neither"][1], tokens=6
    )
    gate_EU = np.round(4 * vector.arguments["mlp.gate.weight"]) / 4
    gate_EU[[3, 4]] = gate_EU[1]
    x_ND = np.round(4 * vector.arguments["x_ND"]) / 4
    arguments = {**vector.arguments, "x_ND": x_ND, "mlp.gate.weight": gate_EU}
    return vector._replace(arguments=arguments)
