"""One forward and backward, every tensor written down for comparison with other implementations.

Source   [spec 8 trace]
"""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.audit.computation_order import GRADIENT, in_order
from mhmoe_np.audit.recorder import Reached, Recorder, Wanted
from mhmoe_np.errors import UserError
from mhmoe_np.model.language_model import Model, checked_ids, forward
from mhmoe_np.model.loss import (
    IGNORED,
    Batch,
    DeviceBatch,
    add_loss_and_gradient,
    loss,
    targets_of,
)
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.sums import Losses, StepSums
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import nearest, shown
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.storage.reading import check_regular, read_json
from mhmoe_np.types import IntArray

LOSSES = ("nll", "aux_loss", "z_loss", "loss")
EVERYTHING = Wanted()


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
    model: Model,
    tokens: IntArray,
    *,
    gradients: bool,
    wanted: Wanted = EVERYTHING,
    ops: Operations,
) -> dict[str, NDArray[Any]]:
    """The tensors of a trace by name, in order of computation.

    tokens: [B, T+1] as from `read_tokens`; a padded input is fed as id 0, which nothing counted
    sees. Without `gradients`, the targets, the losses and the gradients are left out.

    Raises UserError: the tensors of so many tokens do not fit into the memory that is free, or there
    is no tensor that a pattern means or at which to stop.
    """
    config, dtype = model.config, model.weights.dtype
    rows, columns = tokens.shape
    numbers = config.num_hidden_layers * config.hidden_size + config.vocab_size
    check_memory(
        rows * (columns - 1) * numbers * np.dtype(dtype).itemsize,
        f"tokens: the hidden states and logits of {rows} rows of {columns - 1} need",
        remedy="give fewer rows",
    )
    batch = Batch(np.maximum(tokens[:, :-1], 0), tokens[:, 1:])
    gradient = Parameters(config, dtype).to_device(ops) if gradients else None
    recorder = Recorder(ops, model, gradient, wanted, sequences=rows)
    with suppress(Reached):
        recorder.write("input_ids", tokens[:, :-1])
        if gradient is None:
            id_BT = ops.to_device(checked_ids(batch.input_BT, config))
            forward(model, id_BT, None, drop=True, ops=cast(Operations, recorder))
        else:
            recorder.write("target_ids", tokens[:, 1:])
            losses = _losses_and_gradient(model, gradient, batch, recorder, wanted, ops=ops)
            for name in LOSSES:
                recorder.write(name, np.array(getattr(losses, name), dtype))
    _check_found(wanted, recorder.seen)
    return {name: recorder.tensors[name] for name in in_order(recorder.tensors)}


def _losses_and_gradient(
    model: Model,
    gradient: Parameters,
    batch: Batch,
    recorder: Recorder,
    wanted: Wanted,
    *,
    ops: Operations,
) -> Losses:
    """The losses of a batch; its gradient, as far as that is wanted, goes to the recorder.

    Raises Reached: what is wanted ends before them.
    """
    observed = cast(Operations, recorder)
    if wanted.stop_at in LOSSES:
        return loss(model, [batch], ops=observed).losses
    sums, targets = StepSums(model.config, ops=ops), targets_of([batch])
    device_batch = DeviceBatch.of(batch, model.config, ops=ops)
    try:
        add_loss_and_gradient(model, gradient, [device_batch], sums, targets=targets, ops=observed)
    except Reached:
        if not str(wanted.stop_at).startswith(GRADIENT):
            raise
    return sums.read(targets, model.weights.dtype).losses


def _check_found(wanted: Wanted, seen: set[str]) -> None:
    """Refuse a name or a pattern that no tensor of the trace has."""
    if wanted.stop_at is not None and wanted.stop_at not in seen:
        hint = nearest(wanted.stop_at, seen)
        raise UserError(f"--stop-at {shown(wanted.stop_at)}: the trace has no such tensor{hint}")
    for pattern in wanted.only:
        if not any(fnmatchcase(name, pattern) for name in seen):
            raise UserError(f"--only {shown(pattern)}: no tensor of the trace has such a name")
