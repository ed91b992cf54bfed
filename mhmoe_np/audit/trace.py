"""One forward and backward, every tensor written down for comparison with other implementations.

Source   [spec 8].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.model.language_model import (
    IGNORED,
    Model,
    backward,
    forward,
    losses_backward,
    losses_of,
)
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import IntArray


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
    config = model.config
    B, T = tokens.shape[0], tokens.shape[1] - 1
    input_BT, target_BT = tokens[:, :-1], tokens[:, 1:]
    target_N = target_BT.reshape(-1)
    x_ND, statistics, cache = forward(
        model, np.maximum(input_BT, 0), target_N != IGNORED, drop=True, ops=ops
    )
    tensors: dict[str, NDArray[Any]] = {"input_ids": input_BT}
    outputs_ND = [block.x_ND for block in cache.blocks[1:]] + [cache.last_ND]
    for layer, (block, output_ND) in enumerate(zip(cache.blocks, outputs_ND, strict=True)):
        if block.moe is not None:
            tensors[f"layers.{layer}.router_logits"] = block.moe.logits_ME
            tensors[f"layers.{layer}.experts"] = block.moe.routing.expert_MK
        tensors[f"layers.{layer}.hidden"] = output_ND.reshape(B, T, -1)
    output_VD = model.weights.output_VD
    tensors["logits"] = ops.linear(x_ND, output_VD, None).reshape(B, T, -1)
    if not gradients:
        return tensors

    gradient = Parameters(config, x_ND.dtype)
    targets = int(np.count_nonzero(target_N != IGNORED))
    nll_N, dx_ND = ops.token_nll_and_gradient(
        x_ND, output_VD, target_N, gradient.output_VD, dnll=1 / targets
    )
    nll_sum = float(nll_N.sum(dtype=np.float64))
    losses = losses_of(nll_sum, targets, statistics, config)
    backward(dx_ND, cache, losses_backward(statistics, config), model, gradient, ops=ops)
    tensors["target_ids"] = target_BT
    for name, value in losses._asdict().items():
        tensors[name] = np.array(value, x_ND.dtype)
    tensors |= {f"grad.{name}": tensor for name, tensor in gradient.tensors.items()}
    return tensors
