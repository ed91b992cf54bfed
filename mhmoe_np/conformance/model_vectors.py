"""Vectors of whole models: a trace of every kind, of a checkpoint and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.audit.models import KINDS, settings
from mhmoe_np.audit.trace import trace
from mhmoe_np.conformance.vector import Arrays, Draw, Options, Outcome, Vector
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.loss import IGNORED, add_loss_and_gradient
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.sums import losses_of
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray

# Small files; and no width is another's, so that none can stand in for it. Heads have a width of their
# own, for a third or a quarter of 12 would be odd.
SMALL = {"vocab_size": 19, "hidden_size": 12, "head_dim": 4, "moe_intermediate_size": 7}
DRAWS = {"model/fine-sign-one-key-value-head": 1, "model/mh2-ternary-projections": 2}
"""Models whose first draw has a choice or a quantiser near a tie: which draw has none."""


def model_vectors() -> Iterator[Vector]:
    """Every kind on two sequences, the second padded; then the edges."""
    for kind in KINDS:
        yield _model(kind, "Two sequences, the second padded.", _two_sequences(kind))
    one_token = np.array([[7, 11]])
    for kind in ("dense-grouped-heads", "mh3-shared-sub-norm", "mh2-ternary"):
        yield _model(kind, "One token.", one_token, case="one-token")
    alike = np.tile([[5, 9]], (6, 1))
    for kind in ("smoe", "mh2-capacity"):
        yield _model(
            kind, "Six sequences of the same token: most experts are empty.", alike, case="alike"
        )


def small_settings(kind: str) -> dict[str, Any]:
    """The kind's configuration at the vectors' size: what it sets itself stays, but widths."""
    own = settings(kind)
    sizes = {key: size for key, size in SMALL.items() if key != "moe_intermediate_size" or key in own}
    return {**own, **sizes, **{key: KINDS[kind][key] for key in ("head_dim",) if key in KINDS[kind]}}


def drawn_parameters(config: ModelConfig, name: str) -> Parameters:
    """Initial parameters in float32; norms and biases, which start alike, are drawn as well."""
    draw = DRAWS.get(name, 0)
    parameters = Parameters(config, np.float32)
    initialise(parameters, seed=draw)
    for tensor, array in parameters.tensors.items():
        if "norm" in tensor or tensor.endswith(".bias"):
            array[...] = ("norm" in tensor) + Draw(tensor, draw=draw)(*array.shape, scale=0.25)
    return parameters


def filled(config: ModelConfig, given: Arrays, dtype: DTypeLike, *, prefix: str = "") -> Parameters:
    """Parameters from the tensors of their names, which lack `prefix`; others are 0."""
    parameters = Parameters(config, dtype)
    for name, tensor in parameters.tensors.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in given:
            tensor[...] = given[name.removeprefix(prefix)]
    return parameters


def model(ops: Operations, given: Arrays, options: Options) -> Outcome:
    """`mhmoe-np trace` of the checkpoint and its tokens: the gradients are those of `loss`."""
    config = ModelConfig.model_validate(options)
    weights = filled(config, given, given["model.norm.weight"].dtype)
    tensors = trace(
        Model.of(weights.to_device(ops), ops=ops), tokens_of(given), gradients=True, ops=ops
    )
    results = {name: tensor for name, tensor in tensors.items() if name not in given}
    gradients = {name: results.pop(name) for name in tensors if name.startswith("grad.")}
    return Outcome(results, gradients)


def tokens_of(arguments: Arrays) -> IntArray:
    """What `mhmoe-np trace` is given.

    Shapes   -> [B, T+1]
    """
    return np.concatenate([arguments["input_ids"], arguments["target_ids"][:, -1:]], axis=1)


def _two_sequences(kind: str) -> IntArray:
    tokens = Draw(f"tokens of {kind}").integers(SMALL["vocab_size"], 2, 7)
    tokens[1, 5:] = IGNORED
    return tokens


def _model(kind: str, about: str, tokens: IntArray, *, case: str = "") -> Vector:
    name = f"model/{kind}-{case}" if case else f"model/{kind}"
    config = ModelConfig.model_validate(small_settings(kind))
    weights: dict[str, FloatArray] = drawn_parameters(config, name).tensors
    return Vector(
        name,
        about,
        model,
        {**weights, "input_ids": tokens[:, :-1].copy(), "target_ids": tokens[:, 1:].copy()},
        options=config.model_dump(),
        functions=(forward, losses_of, add_loss_and_gradient),
    )
