"""The whole model, there and back: the list of layers in both directions.

Layers hold no state; a `Model` is its configuration, its weights and the tables of rotary angles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_np.layers.balance import Tally
from mhmoe_np.layers.block import BlockCache, block_backward_in_place, block_forward
from mhmoe_np.layers.rotary import Rotary, rotary_tables
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import EMBEDDING, FINAL_NORM, Weights, quantised_anew
from mhmoe_np.operations.table import Operations, RouterLosses
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray


class Model(NamedTuple):
    """Everything a forward pass reads."""

    config: ModelConfig
    weights: Weights
    rotary: Rotary

    @classmethod
    def of(cls, parameters: Parameters, *, ops: Operations) -> Model:
        """The model with these parameters, which are the backend's arrays (`Parameters.to_device`).

        After a change of quantised ones, call `requantise`.
        """
        weights = quantised_anew(parameters, packed=ops.prefers_packed, ops=ops)
        return cls.with_weights(parameters.config, weights, ops=ops)

    @classmethod
    def with_weights(cls, config: ModelConfig, weights: Weights, *, ops: Operations) -> Model:
        """The model with weights that are ready for use, in the backend's arrays."""
        rotary = rotary_tables(
            config.max_position_embeddings,
            config.head_dim,
            config.rope_theta,
            weights.dtype,
            ops=ops,
        )
        return cls(config, weights, rotary)


class ForwardCache(NamedTuple):
    """What the backward and the trace need of the forward."""

    id_N: IntArray
    blocks: list[BlockCache]
    last_ND: FloatArray  # the last block's output
    rstd_N: FloatArray


def checked_ids(id_BT: IntArray, config: ModelConfig, *, first: int = 0) -> IntArray:
    """The host's token ids of positions first .. first+T-1, as operations take them.

    Shapes   id_BT -> id_BT
    Raises   ValueError: positions beyond the model's, or an id outside the vocabulary.
    Source   [spec 1 embed_tokens]
    """
    check_positions(first + id_BT.shape[1], config)
    return known_ids(id_BT, config)


def check_positions(last: int, config: ModelConfig) -> None:
    """Refuse more positions than the model has.

    Raises   ValueError
    Source   [spec 2 RoPE]
    """
    if last > config.max_position_embeddings:
        raise ValueError(
            f"{last} positions are more than max_position_embeddings {config.max_position_embeddings}"
        )


def known_ids(ids: IntArray, config: ModelConfig) -> IntArray:
    """The host's token ids as operations take them.

    Shapes   -> those of ids
    Raises   ValueError: one lies outside the vocabulary.
    Source   [spec 1 embed_tokens]
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(f"token ids must lie in 0 .. {config.vocab_size - 1}")
    return np.ascontiguousarray(ids, np.int64)


def forward(
    model: Model,
    id_BT: IntArray,
    tallies: Sequence[Tally | None] | None,
    *,
    drop: bool,
    ops: Operations,
) -> tuple[FloatArray, ForwardCache]:
    """The final norm's output y_ND, from which logits = y_ND @ W_out.T.

    id_BT: the backend's, of ids that `checked_ids` has seen.
    tallies: for each layer what its router's statistics count and where (`StepSums.tallies`); None:
    nobody counts, and no backward follows.
    drop: whether `moe_capacity_factor` applies (training and traces) or not (evaluation,
    generation) [D4].

    Shapes   id_BT -> y_ND
    Source   [spec 1 embed_tokens], [spec 2 pre-norm], [spec 2 final norm]
    """
    config, weights, rotary = model
    id_N = id_BT.reshape(-1)
    x_ND = ops.embedding(id_N, weights.embedding_VD)
    caches = []
    for layer, w in enumerate(weights.blocks):
        x_ND, cache = block_forward(
            x_ND,
            w,
            rotary,
            None,
            tallies[layer] if tallies is not None else None,
            sequences=len(id_BT),
            drop=drop,
            config=config,
            ops=ops,
        )
        caches.append(cache)
    y_ND, rstd_N = ops.rms_norm(x_ND, weights.final_norm_D, eps=config.rms_norm_eps)
    return y_ND, ForwardCache(id_N, caches, x_ND, rstd_N)


def backward(
    dy_ND: FloatArray,
    cache: ForwardCache,
    losses: Sequence[RouterLosses | None],
    model: Model,
    gradient: Parameters,
    *,
    ops: Operations,
) -> None:
    """Add the gradient of every parameter below the output head to `gradient`.

    dy_ND is the gradient of the final norm's output; losses has an entry for each layer
    (`StepSums.losses_backward`).

    Shapes   dy_ND, cache, losses
    Source   [spec 2 pre-norm], [spec 2 final norm]
    """
    config, weights, rotary = model
    dx_ND = ops.rms_norm_backward(
        dy_ND, cache.last_ND, weights.final_norm_D, cache.rstd_N, gradient.arrays[FINAL_NORM]
    )
    for block, loss, w, dw in zip(
        reversed(cache.blocks),
        reversed(losses),
        reversed(weights.blocks),
        reversed(gradient.blocks),
        strict=True,
    ):
        block_backward_in_place(dx_ND, block, loss, w, dw, rotary, config=config, ops=ops)
    ops.embedding_backward(dx_ND, cache.id_N, gradient.arrays[EMBEDDING])


def last_hidden(model: Model, id_BT: IntArray, *, ops: Operations) -> FloatArray:
    """`forward`'s y_ND without capacity, where no backward follows: one block's memory serves all.

    Shapes   id_BT -> y_ND
    Source   [spec 2 pre-norm], [spec 2 final norm], [D4]
    """
    config, weights, rotary = model
    x_ND = ops.embedding(id_BT.reshape(-1), weights.embedding_VD)
    for w in weights.blocks:
        with ops.scope():
            x_ND[...], _ = block_forward(
                x_ND,
                w,
                rotary,
                None,
                None,
                sequences=len(id_BT),
                drop=False,
                config=config,
                ops=ops,
            )
    y_ND, _ = ops.rms_norm(x_ND, weights.final_norm_D, eps=config.rms_norm_eps)
    return y_ND
