"""Every tensor of a trace, computed from the tensors before it in that same trace.

Another implementation's trace against our weights: each layer is given the other's hidden state and,
for what follows the router, the other's logits and choices. So errors do not run into each other, and
the layer that is wrong is named even in a model that differs everywhere after it. Where the trace
leaves a tensor out, ours takes its place.

The gradient is that of the other's forward, with our backward; backwards do run into each other, and
the first gradient that differs, in the order of computation, is the one to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.comparison.difference import Tensor
from mhmoe_np.comparison.given import Given, Others
from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.errors import UserError
from mhmoe_np.layers.balance import Tally
from mhmoe_np.layers.block import BlockCache, block_forward
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.layers.rotary import Rotary
from mhmoe_np.model.language_model import ForwardCache, Model, backward
from mhmoe_np.model.loss import IGNORED
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import StepSums
from mhmoe_np.operations.table import LayerWeights
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray, IntArray


class Layer(NamedTuple):
    """What one layer computes with."""

    config: ModelConfig
    w: LayerWeights
    rotary: Rotary

    @classmethod
    def of(cls, model: Model, number: int) -> Layer:
        """Layer `number` of a model, from 0."""
        return cls(model.config, model.weights.blocks[number], model.rotary)


class Ids(NamedTuple):
    """The tokens of a trace."""

    id_BT: IntArray  # padding as id 0
    target_N: IntArray | None

    def counted(self, heads: int) -> BoolArray | None:
        """Which sub-tokens the router's statistics count.

        Shapes   -> [M]
        """
        return None if self.target_N is None else np.repeat(self.target_N != IGNORED, heads)


def ids_of(theirs: Trace, config: ModelConfig, *, source: str) -> Ids:
    """The tokens that a trace was made of.

    Raises UserError: the trace lacks `input_ids`, or they are not ids of this model.
    """
    ids = theirs.get("input_ids")
    if ids is None:
        raise UserError(
            f"{source}: lacks 'input_ids', from which the model is computed; write them too"
        )
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise UserError(f"{source}: 'input_ids' must be integers [B, T]")
    if ids.shape[1] > config.max_position_embeddings:
        raise UserError(
            f"{source}: 'input_ids' has {ids.shape[1]} positions; the checkpoint has "
            f"{config.max_position_embeddings} (max_position_embeddings)"
        )
    target = theirs.get("target_ids")
    if target is not None and (target.shape != ids.shape or target.dtype.kind not in "iu"):
        raise UserError(f"{source}: 'target_ids' must be integers of the shape of 'input_ids'")
    for name, array in (("input_ids", ids), ("target_ids", target)):
        if array is not None and not IGNORED <= array.min() <= array.max() < config.vocab_size:
            raise UserError(f"{source}: {name!r} must lie in 0 .. {config.vocab_size - 1} (or be -100)")
    id_BT = np.maximum(ids.astype(np.int64), 0)
    if target is None or (target < 0).all():
        return Ids(id_BT, None)
    return Ids(id_BT, target.astype(np.int64).ravel())


def taken(theirs: Trace, name: str, ours: Tensor) -> Tensor:
    """Their tensor in the place of ours, where they have one that fits."""
    tensor = theirs.get(name)
    if tensor is None or tensor.size != ours.size or tensor.dtype.kind != ours.dtype.kind:
        return ours
    return np.asarray(tensor.reshape(ours.shape), ours.dtype, order="C")


def others_of(
    theirs: Trace, number: int, config: ModelConfig, dtype: Any, *, sub_tokens: int
) -> Others:
    """What their router did in a layer, as far as it makes sense."""
    M, E, K = sub_tokens, config.num_experts, config.num_experts_per_tok
    logits = theirs.get(f"layers.{number}.router_logits")
    expert_MK = theirs.get(f"layers.{number}.experts")
    if logits is not None:
        fits = logits.dtype.kind == "f" and logits.shape[-1:] == (E,) and logits.size == M * E
        logits = np.asarray(logits.reshape(M, E), dtype, order="C") if fits else None
    if expert_MK is not None:
        fits = expert_MK.shape[-1:] == (K,) and expert_MK.size == M * K and _are_choices(expert_MK, E)
        expert_MK = np.asarray(expert_MK.reshape(M, K), np.int64, order="C") if fits else None
    return Others(logits, expert_MK)


def _are_choices(expert_MK: Tensor, E: int) -> bool:
    """Whether these are different experts of each sub-token.

    Shapes   expert_MK
    """
    return (
        expert_MK.dtype.kind in "iu"
        and expert_MK.min(initial=0) >= 0
        and expert_MK.max(initial=0) < E
        and bool((np.diff(np.sort(expert_MK.astype(np.int64), axis=-1), axis=-1) > 0).all())
    )


def layer_from(
    layer: Layer,
    x_ND: FloatArray,
    others: Others,
    code_N: IntArray,
    tally: Tally | None,
    *,
    sequences: int,
    ops: Given,
) -> tuple[dict[str, NDArray[Any]], BlockCache]:
    """One layer's tensors of a trace, by their names within the layer, of the given input.

    code_N: which activations at ties are turned, see `Given.enter`.

    Shapes   x_ND, others, code_N
    """
    ops.enter(layer.w, others, code_N)
    y_ND, cache = block_forward(
        x_ND,
        layer.w,
        layer.rotary,
        None,
        tally,
        sequences=sequences,
        drop=True,
        config=layer.config,
        ops=ops,
    )
    tensors: dict[str, NDArray[Any]] = {}
    if isinstance(cache.feed_forward, MoeCache):
        assert ops.chosen_MK is not None
        tensors |= {"router_logits": cache.feed_forward.logits_ME, "experts": ops.chosen_MK}
    tensors["hidden"] = y_ND.reshape(sequences, -1, y_ND.shape[1])
    return tensors, cache


def model_from(
    theirs: Trace, model: Model, ids: Ids, codes: Mapping[int, IntArray], *, ops: Given
) -> Trace:
    """Every tensor of section 8 that can be computed from theirs.

    codes: of layers in which activations at ties are turned, see `Given.enter`.
    """
    config, weights = model.config, model.weights
    B, T = ids.id_BT.shape
    ours: Trace = {}
    gradient = Parameters(config, weights.dtype)
    sums = StepSums(config, ops=ops)
    counted_M = ids.counted(config.moe_heads)
    tallies = [None] * config.num_hidden_layers if counted_M is None else sums.tallies(counted_M)

    x_ND = ops.embedding(ids.id_BT.ravel(), weights.embedding_VD)
    blocks = []
    for number, tally in enumerate(tallies):
        tensors, cache = layer_from(
            Layer.of(model, number),
            x_ND,
            others_of(theirs, number, config, weights.dtype, sub_tokens=B * T * config.moe_heads),
            codes.get(number, np.zeros(B * T, np.int64)),
            tally,
            sequences=B,
            ops=ops,
        )
        ours |= {f"layers.{number}.{name}": tensor for name, tensor in tensors.items()}
        blocks.append(cache)
        hidden = f"layers.{number}.hidden"
        x_ND = taken(theirs, hidden, ours[hidden]).reshape(B * T, -1)
    y_ND, rstd_N = ops.rms_norm(x_ND, weights.final_norm_D, eps=config.rms_norm_eps)
    ours["logits"] = ops.linear(y_ND, weights.output_VD, None).reshape(B, T, -1)
    if ids.target_N is None:
        return ours

    targets = int(np.count_nonzero(ids.target_N != IGNORED))
    nll_N, dy_ND = ops.token_nll_and_gradient(
        y_ND, weights.output_VD, ids.target_N, gradient.output_VD, dnll=1 / targets
    )
    ops.add_sum(nll_N, sums.nll_1)
    losses = sums.read(targets, weights.dtype).losses
    ours["nll"] = _mean_nll(taken(theirs, "logits", ours["logits"]), ids.target_N)
    for name in ("aux_loss", "z_loss"):
        ours[name] = np.array(getattr(losses, name), weights.dtype)
    nll, aux, z = (float(taken(theirs, name, ours[name])) for name in ("nll", "aux_loss", "z_loss"))
    total = nll + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z
    ours["loss"] = np.array(total, weights.dtype)
    if any(name.startswith("grad.") for name in theirs):
        whole = ForwardCache(ids.id_BT.ravel(), blocks, x_ND, rstd_N)
        backward(dy_ND, whole, sums.losses_backward(targets), model, gradient, ops=ops)
        ours |= {f"grad.{name}": tensor for name, tensor in gradient.tensors.items()}
    return ours


def _mean_nll(logits_BTV: FloatArray, target_N: IntArray) -> Tensor:
    """logsumexp(logits) - logits[target], the mean over the targets that count.

    Shapes   logits_BTV, target_N -> []
    """
    counted = np.flatnonzero(target_N != IGNORED)
    logits_NV = logits_BTV.reshape(len(target_N), -1)[counted]
    shifted_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    nll_N = (
        np.log(np.exp(shifted_NV).sum(axis=1)) - shifted_NV[np.arange(len(counted)), target_N[counted]]
    )
    return np.asarray(nll_N.mean())
