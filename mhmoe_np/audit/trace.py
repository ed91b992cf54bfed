"""One forward and backward, every tensor written down for comparison with other implementations.

Source   [spec 8 trace]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.errors import UserError
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache, Model, checked_ids, forward
from mhmoe_np.model.loss import IGNORED, Batch, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.storage.reading import check_regular, read_json
from mhmoe_np.types import FloatArray, IntArray


def read_tokens(path: Path, *, vocab_size: int, max_positions: int) -> IntArray:
    """The token array [B, T+1] of a `.npy` or JSON file, as int64.

    -100 marks padding and may stand only at the right end of a row.

    Raises UserError: not such an array, an id outside the vocabulary, padding elsewhere, too long.
    """
    tokens = _read_json_tokens(path) if path.suffix == ".json" else _map_tokens(path)
    if tokens.shape[0] < 1 or not 2 <= tokens.shape[1] <= max_positions + 1:
        raise UserError(
            f"{path}: shape {list(tokens.shape)}; needs a row or more of 2 to {max_positions + 1} "
            f"tokens (max_position_embeddings {max_positions})"
        )
    if tokens.min() < IGNORED or tokens.max() >= vocab_size:
        raise _outside(path, vocab_size)
    tokens = tokens.astype(np.int64)
    padded = tokens == IGNORED
    if np.any(padded[:, :-1] & ~padded[:, 1:]) or padded[:, 0].any():
        raise UserError(f"{path}: padding (-100) may stand only at the right end of a row")
    if padded[:, 1:].all():
        raise UserError(f"{path}: no target to count: every one is -100")
    if tokens[~padded].min() < 0:
        raise _outside(path, vocab_size)
    return tokens


def _outside(path: Path, vocab_size: int) -> UserError:
    return UserError(f"{path}: token ids must lie in 0 .. {vocab_size - 1} (or be -100)")


def _read_json_tokens(path: Path) -> IntArray:
    rows = read_json(path)
    if (
        not isinstance(rows, list)
        or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
        or not all(type(token) is int for row in rows for token in row)
    ):
        raise _misshapen(path)
    limits = np.iinfo(np.int64)
    if not all(limits.min <= token <= limits.max for row in rows for token in row):
        raise UserError(f"{path}: holds an integer beyond 64 bits; give token ids")
    return np.array(rows, np.int64).reshape(len(rows), len(rows[0]) if rows else 0)


def _map_tokens(path: Path) -> IntArray:
    """The array of a `.npy` file, mapped: a header that promises more than there is takes nothing."""
    check_regular(path)
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # A damaged header raises whatever Python does when it evaluates it.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a .npy or JSON array of token ids: {reason}") from None
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise _misshapen(path)
    return tokens


def _misshapen(path: Path) -> UserError:
    return UserError(f"{path}: must hold a two-dimensional array of integers, [B, T+1]")


def trace(
    model: Model, tokens: IntArray, *, gradients: bool, ops: Operations
) -> dict[str, NDArray[Any]]:
    """Every tensor of a trace, by its name, in order of computation.

    tokens: [B, T+1] as from `read_tokens`; a padded input is fed as id 0, which nothing counted
    sees. Without `gradients`, the targets, the losses and the gradients are left out.

    Raises UserError: the tensors of so many tokens do not fit into the memory that is free.
    """
    config = model.config
    rows, columns = tokens.shape
    numbers = config.num_hidden_layers * config.hidden_size + config.vocab_size
    check_memory(
        rows * (columns - 1) * numbers * np.dtype(model.weights.dtype).itemsize,
        f"tokens: the hidden states and logits of {rows} rows of {columns - 1} need",
        remedy="give fewer rows",
    )
    input_BT, target_BT = tokens[:, :-1], tokens[:, 1:]
    fed_BT = np.maximum(input_BT, 0)
    tensors: dict[str, NDArray[Any]] = {"input_ids": input_BT}

    def write_down(y_ND: FloatArray, cache: ForwardCache) -> None:
        tensors.update(_activations(model, y_ND, cache, sequences=len(tokens), ops=ops))

    if not gradients:
        id_BT = ops.to_device(checked_ids(fed_BT, config))
        write_down(*forward(model, id_BT, None, drop=True, ops=ops))
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
