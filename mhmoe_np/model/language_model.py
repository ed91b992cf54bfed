"""The whole model, there and back: the list of layers in both directions.

Source   [spec 2] and [spec 4]. Layers hold no state; a `Model` is its configuration, its parameters
and the table of rotary angles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from mhmoe_np.layers.balance import RouterStatistics, balance_loss, expert_share, z_loss
from mhmoe_np.layers.block import BlockCache, block_backward_in_place, block_forward
from mhmoe_np.layers.moe import BalanceUpstream
from mhmoe_np.layers.rotary import Rotary, rotary_angles
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import EMBEDDING, FINAL_NORM, Weights, requantise
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray, IntArray

IGNORED = -100  # a target that is not counted


class Model(NamedTuple):
    """Everything a forward pass reads."""

    config: ModelConfig
    weights: Weights
    rotary: Rotary

    @classmethod
    def of(cls, parameters: Parameters, *, ops: Operations) -> Model:
        """The model with these parameters; after a change of quantised ones, call `requantise`."""
        weights = Weights.of(parameters, packed=ops.prefers_packed)
        requantise(weights, parameters, ops=ops)
        return cls.with_weights(parameters.config, weights)

    @classmethod
    def with_weights(cls, config: ModelConfig, weights: Weights) -> Model:
        """The model with weights that are ready for use."""
        rotary = rotary_angles(
            config.max_position_embeddings, config.head_dim, config.rope_theta, weights.dtype
        )
        return cls(config, weights, rotary)


class Batch(NamedTuple):
    """Token ids in, token ids wanted; a target of -100 is padding."""

    input_BT: IntArray
    target_BT: IntArray

    @classmethod
    def of(cls, token_BT1: IntArray) -> Batch:
        """From windows [B, T+1]: all but the last token go in, all but the first are wanted."""
        return cls(np.ascontiguousarray(token_BT1[:, :-1]), token_BT1[:, 1:])


class ForwardCache(NamedTuple):
    """What the backward and the trace need of the forward."""

    input_BT: IntArray
    blocks: list[BlockCache]
    last_ND: FloatArray  # the last block's output
    rstd_N: FloatArray


class Losses(NamedTuple):
    """The loss and its parts, in nats; aux and z are sums over layers without their coefficients."""

    loss: float
    nll: float
    aux_loss: float
    z_loss: float


def forward(
    model: Model, input_BT: IntArray, counted_N: BoolArray, *, drop: bool, ops: Operations
) -> tuple[FloatArray, list[RouterStatistics], ForwardCache]:
    """The final norm's output x_ND, from which logits = x_ND @ W_out.T.

    counted_N: which positions the router's statistics count.
    drop: whether `moe_capacity_factor` applies (training and traces) or not (evaluation,
    generation) [D4].
    Raises ValueError: more positions than the model has, or an id outside the vocabulary.
    """
    config, weights, _ = model
    x_ND, rotary = _start(model, input_BT, ops=ops)
    caches, statistics = [], []
    for layer, w in enumerate(weights.blocks):
        x_ND, layer_statistics, cache = block_forward(
            x_ND,
            w,
            rotary,
            counted_N,
            sequences=len(input_BT),
            is_moe=config.is_moe_layer(layer),
            drop=drop,
            config=config,
            ops=ops,
        )
        caches.append(cache)
        if layer_statistics is not None:
            statistics.append(layer_statistics)
    y_ND, rstd_N = ops.rms_norm(x_ND, weights.final_norm_D, eps=config.rms_norm_eps)
    return y_ND, statistics, ForwardCache(input_BT, caches, x_ND, rstd_N)


def _start(model: Model, input_BT: IntArray, *, ops: Operations) -> tuple[FloatArray, Rotary]:
    """What the first block receives, and the angles of the batch's positions; see `forward`."""
    config = model.config
    positions = input_BT.shape[1]
    if positions > config.max_position_embeddings:
        raise ValueError(
            f"{positions} positions are more than max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    id_N = input_BT.reshape(-1)
    if id_N.size and not 0 <= id_N.min() <= id_N.max() < config.vocab_size:
        raise ValueError(f"token ids must lie in 0 .. {config.vocab_size - 1}")
    return ops.embedding(id_N, model.weights.embedding_VD), model.rotary.window(0, positions)


def last_hidden(model: Model, input_BT: IntArray, *, ops: Operations) -> FloatArray:
    """`forward`'s x_ND without capacity, where no backward follows: one block's memory serves all.

    Raises ValueError: see `forward`.
    """
    x_ND, rotary = _start(model, input_BT, ops=ops)
    counted_N = np.ones(len(x_ND), np.bool_)  # for statistics that nobody asks for
    for layer, w in enumerate(model.weights.blocks):
        with ops.scope():
            y_ND, _, _ = block_forward(
                x_ND,
                w,
                rotary,
                counted_N,
                sequences=len(input_BT),
                is_moe=model.config.is_moe_layer(layer),
                drop=False,
                config=model.config,
                ops=ops,
            )
            x_ND[...] = y_ND
    y_ND, _ = ops.rms_norm(x_ND, model.weights.final_norm_D, eps=model.config.rms_norm_eps)
    return y_ND


def backward(
    dy_ND: FloatArray,
    cache: ForwardCache,
    balance: Sequence[BalanceUpstream],
    model: Model,
    gradient: Parameters,
    *,
    ops: Operations,
) -> None:
    """Add the gradient of every parameter below the output head to `gradient`.

    dy_ND is the gradient of the final norm's output; balance has one entry for each MoE layer.
    """
    config, weights, _ = model
    rotary = model.rotary.window(0, cache.input_BT.shape[1])
    dx_ND = ops.rms_norm_backward(
        dy_ND,
        cache.last_ND,
        weights.final_norm_D,
        cache.rstd_N,
        gradient.arrays[FINAL_NORM],
    )
    remaining = list(balance)
    for block, w, dw in zip(
        reversed(cache.blocks), reversed(weights.blocks), reversed(gradient.blocks), strict=True
    ):
        upstream = remaining.pop() if block.moe is not None else None
        block_backward_in_place(dx_ND, block, upstream, w, dw, rotary, config=config, ops=ops)
    ops.embedding_backward(dx_ND, cache.input_BT.reshape(-1), gradient.arrays[EMBEDDING])


def losses_of(
    nll_sum: float, targets: int, statistics: Sequence[RouterStatistics], config: ModelConfig
) -> Losses:
    """loss = mean NLL + aux_coef * sum of layers' aux + z_coef * sum of layers' z [spec 4]."""
    nll = nll_sum / targets
    aux = sum(balance_loss(layer, config.router_aux_loss_type) for layer in statistics)
    z = sum(z_loss(layer) for layer in statistics)
    total = nll + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z
    return Losses(total, nll, aux, z)


def losses_backward(
    statistics: Sequence[RouterStatistics], config: ModelConfig
) -> list[BalanceUpstream]:
    """What the loss sends into each MoE layer's router beside the task's gradient."""
    return [
        BalanceUpstream(
            share_E=expert_share(layer, config.router_aux_loss_type),
            sub_tokens=layer.sub_tokens,
            daux=config.router_aux_loss_coef,
            dz=config.router_z_loss_coef,
        )
        for layer in statistics
    ]


def batch_statistics(
    model: Model, micro_batches: Sequence[Batch], *, ops: Operations
) -> list[RouterStatistics]:
    """Each MoE layer's router statistics over all micro-batches, by forward passes alone."""
    parts = []
    for batch in micro_batches:
        with ops.scope():
            counted_N = batch.target_BT.reshape(-1) != IGNORED
            parts.append(forward(model, batch.input_BT, counted_N, drop=True, ops=ops)[1])
    return [reduce(RouterStatistics.merged, layer) for layer in zip(*parts, strict=True)]


def loss_and_gradient(
    model: Model, gradient: Parameters, micro_batches: Sequence[Batch], *, ops: Operations
) -> tuple[Losses, list[RouterStatistics]]:
    """The loss of one batch that comes in micro-batches; its gradient is added to `gradient`.

    The result is that of the big batch: the mean is over all its targets, and the balance loss uses
    the experts' shares in all of it. Those shares are known only after every micro-batch was routed,
    so with more than one micro-batch a forward pass over all of them comes first [D5].

    Raises ValueError: no target is counted, or what `forward` raises.
    """
    config = model.config
    targets = sum(int(np.count_nonzero(batch.target_BT != IGNORED)) for batch in micro_batches)
    if targets == 0:
        raise ValueError("the batch has no target to count: every one is -100")
    routed = len(micro_batches) > 1 and config.num_experts > 0
    whole = batch_statistics(model, micro_batches, ops=ops) if routed else None
    nll_sum = 0.0
    for batch in micro_batches:
        with ops.scope():
            target_N = batch.target_BT.reshape(-1)
            x_ND, own, cache = forward(model, batch.input_BT, target_N != IGNORED, drop=True, ops=ops)
            nll_N, dx_ND = ops.token_nll_and_gradient(
                x_ND, model.weights.output_VD, target_N, gradient.output_VD, dnll=1 / targets
            )
            nll_sum += float(nll_N.sum(dtype=np.float64))
            whole = whole or own
            backward(dx_ND, cache, losses_backward(whole, config), model, gradient, ops=ops)
    statistics = whole or []
    return losses_of(nll_sum, targets, statistics, config), statistics
