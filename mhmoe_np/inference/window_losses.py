"""The NLL of every scored token of a text's windows, many windows at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from mhmoe_np.inference.protocols import Window
from mhmoe_np.model.language_model import Model, check_positions, known_ids, last_hidden
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray

UNSCORED = -1
# Inputs that a device computes before the host asks for what came out; on the host itself each batch is
# ready at once.
DEVICE_INPUTS = 1 << 18


def window_losses(
    model: Model,
    token_W: IntArray,
    windows: Iterable[Window],
    *,
    bos_token_id: int | None,
    batch_tokens: int,
    ops: Operations,
    likeliest: bool = False,
) -> Iterator[tuple[Window, FloatArray, bool]]:
    """Each window and the NLL in nats of its scored tokens, on the host, in their order.

    With it comes whether each scored token is the likeliest at its place, if `likeliest` asks for it.

    batch_tokens: about how many inputs go through the model at once. A window that is shorter than
    others of its batch is padded behind its end, where no token of it looks.

    Raises ValueError: a window is longer than the model's positions, or an id not of its vocabulary.
    """
    compute = partial(_portion, model, token_W, bos_token_id=bos_token_id, likeliest=likeliest, ops=ops)
    portion: list[list[Window]] = []
    inputs, most = 0, 0 if ops.device() is None else DEVICE_INPUTS
    for batch in _batches(windows, batch_tokens):
        portion.append(batch)
        inputs += sum(window.inputs for window in batch)
        if inputs > most:
            yield from compute(portion)
            portion, inputs = [], 0
    if portion:
        yield from compute(portion)


def _batches(windows: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, window.inputs)
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch, longest = [], window.inputs
        batch.append(window)
    if batch:
        yield batch


def _portion(
    model: Model,
    token_W: IntArray,
    batches: list[list[Window]],
    *,
    bos_token_id: int | None,
    likeliest: bool,
    ops: Operations,
) -> Iterator[tuple[Window, FloatArray, bool]]:
    """Several batches of windows: one copy to the device, one back."""
    shapes = [(len(batch), max(window.inputs for window in batch)) for batch in batches]
    check_positions(max(length for _, length in shapes), model.config)
    sizes = [rows * length for rows, length in shapes]
    both = np.empty((2, sum(sizes)), np.int64)  # what goes in, and what is wanted
    both[0], both[1] = 0, UNSCORED
    places, place = [], 0
    for batch, (_, length) in zip(batches, shapes, strict=True):
        for window in batch:
            whole = known_ids(token_W[window.begin : window.end], model.config)
            if window.bos:
                assert bos_token_id is not None
                whole = np.concatenate([[bos_token_id], whole])
            last = place + window.inputs
            both[0, place:last] = whole[:-1]
            both[1, last - window.scored : last] = whole[len(whole) - window.scored :]
            places.append((window, slice(last - window.scored, last)))
            place += length
    wanted = ops.to_device(both)
    losses = ops.zeros((sum(sizes),), model.weights.dtype)
    first = 0
    found_likeliest: list[bool] = []
    for size, shape in zip(sizes, shapes, strict=True):
        part = slice(first, first + size)
        inputs, targets = wanted[0, part], wanted[1, part]
        with ops.scope():
            x_ND = last_hidden(model, inputs.reshape(shape), ops=ops)
            losses[part] = ops.token_nll(x_ND, model.weights.output_VD, targets)
            for _, scored in places[len(found_likeliest) :] if likeliest else []:
                if scored.start >= first + size:
                    break
                rows = x_ND[scored.start - first : scored.stop - first]
                logits = ops.to_host(ops.linear(rows, model.weights.output_VD, None))
                agrees = logits.argmax(axis=1) == both[1, scored]
                found_likeliest.append(bool(agrees.all()))
        first += size
    found = ops.to_host(losses)
    for i, (window, scored) in enumerate(places):
        yield window, found[scored], likeliest and found_likeliest[i]
