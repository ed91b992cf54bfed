"""One forward and backward, every tensor written down for comparison with other implementations.

Source   [spec 8 trace]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache, Model, forward
from mhmoe_np.model.loss import IGNORED, Batch, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray


def read_tokens(path: Path, *, vocab_size: int, max_positions: int) -> IntArray:
    """The token array [B, T+1] of a `.npy` or JSON file, as int64.

    -100 marks padding and may stand only at the right end of a row.

    Raises UserError: not such an array, an id outside the vocabulary, padding elsewhere, too long.
    """
    try:
        if path.suffix == ".json":
            tokens = np.array(json.loads(path.read_text(encoding="utf-8")))
        else:
            tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy or JSON array of token ids: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise UserError(f"{path}: must hold a two-dimensional array of integers, [B, T+1]")
    tokens = tokens.astype(np.int64)
    if tokens.shape[0] < 1 or not 2 <= tokens.shape[1] <= max_positions + 1:
        raise UserError(
            f"{path}: shape {list(tokens.shape)}; needs a row or more of 2 to {max_positions + 1} "
            f"tokens (max_position_embeddings {max_positions})"
        )
    padded = tokens == IGNORED
    if np.any(padded[:, :-1] & ~padded[:, 1:]) or padded[:, 0].any():
        raise UserError(f"{path}: padding (-100) may stand only at the right end of a row")
    if padded[:, 1:].all():
        raise UserError(f"{path}: no target to count: every one is -100")
    if tokens[~padded].min() < 0 or tokens.max() >= vocab_size:
        raise UserError(f"{path}: token ids must lie in 0 .. {vocab_size - 1} (or be -100)")
    return tokens


def trace(
    model: Model, tokens: IntArray, *, gradients: bool, ops: Operations
) -> dict[str, NDArray[Any]]:
    """Every tensor of a trace, by its name, in order of computation.

    tokens: [B, T+1] as from `read_tokens`; a padded input is fed as id 0, which nothing counted
    sees. Without `gradients`, the targets, the losses and the gradients are left out.
    """
    input_BT, target_BT = tokens[:, :-1], tokens[:, 1:]
    fed_BT = np.maximum(input_BT, 0)
    tensors: dict[str, NDArray[Any]] = {"input_ids": input_BT}

    def write_down(y_ND: FloatArray, cache: ForwardCache) -> None:
        tensors.update(_activations(model, y_ND, cache, sequences=len(tokens), ops=ops))

    if not gradients:
        write_down(*forward(model, fed_BT, None, drop=True, ops=ops))
        return tensors

    dtype = model.weights.dtype
    gradient = Parameters(model.config, dtype).to_device(ops)
    batch = Batch(fed_BT, target_BT)
    losses = loss_and_gradient(model, gradient, [batch], watch=write_down, ops=ops).losses
    tensors["target_ids"] = target_BT
    for name, value in losses._asdict().items():
        tensors[name] = np.array(value, dtype)
    tensors |= {f"grad.{name}": tensor for name, tensor in gradient.to_host(ops).tensors.items()}
    return tensors


def _activations(
    model: Model, y_ND: FloatArray, cache: ForwardCache, *, sequences: int, ops: Operations
) -> dict[str, NDArray[Any]]:
    """Copies of what a forward came to, layer by layer."""
    tensors: dict[str, NDArray[Any]] = {}

    def keep(name: str, array: Any) -> None:
        tensors[name] = np.array(ops.to_host(array))

    outputs = [*(block.x_ND for block in cache.blocks[1:]), cache.last_ND]
    for layer, (block, output_ND) in enumerate(zip(cache.blocks, outputs, strict=True)):
        if isinstance(block.feed_forward, MoeCache):
            keep(f"layers.{layer}.router_logits", block.feed_forward.logits_ME)
            keep(f"layers.{layer}.experts", block.feed_forward.routing.expert_MK)
        keep(f"layers.{layer}.hidden", output_ND.reshape(sequences, -1, model.config.hidden_size))
    logits_NV = ops.linear(y_ND, model.weights.output_VD, None)
    keep("logits", logits_NV.reshape(sequences, -1, model.config.vocab_size))
    return tensors
