"""Which tokens an expert takes: those that it gets more often than its share of all choices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import (
    checkpoints_of,
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_model,
)
from mhmoe_np.data.store import tokenise
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import Model, checked_ids, forward
from mhmoe_np.operations.table import Operations
from mhmoe_np.training.run_folder import validation_domains
from mhmoe_np.types import IntArray

TOKENS = 8192  # of held-out text that are looked at, unless told otherwise
AT_ONCE = 2048  # tokens that go through the model together
BYTES_PER_TOKEN = 8  # more than a token has on average: so much text is enough
LEAST = 3  # occurrences below which a token says nothing
SHOWN = 8  # tokens of an expert
EXAMPLES = 2
CONTEXT = 8  # tokens on both sides


class Example(NamedTuple):
    """A place where the expert was chosen."""

    before: str
    token: str
    after: str


class OverRepresented(NamedTuple):
    """A token, and how much more of it an expert gets than of others."""

    token: str
    times: float  # its share of the token's choices over its share of all choices
    choices: int  # of this expert for this token


class Taken(NamedTuple):
    """What one expert of one layer takes."""

    layer: int
    expert: int
    share: float  # of all choices of the layer
    tokens: list[OverRepresented]  # most first
    examples: list[Example]  # of the first of them


class ExpertTokens(NamedTuple):
    """What all experts take."""

    checkpoint: str
    tokens: int  # looked at
    layers: dict[int, list[Taken]]


def expert_tokens(run: Path, *, tokens: int = TOKENS, ops: Operations) -> ExpertTokens | None:
    """Send held-out text through the newest checkpoint and see where it goes; None without experts.

    tokens: about how many, the same number of each domain's.

    A token's choices are those of all its heads. Experts' tokens are ordered by (seen - expected) /
    sqrt(expected), so that rare tokens do not come first by chance.

    Raises UserError: there is no whole checkpoint, or its tokenizer is missing.
    """
    if not checkpoints_of(run):
        return None
    checkpoint = find_checkpoint(run)
    model = load_model(checkpoint, np.float32, ops=ops)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    if not model.config.moe_layers:
        return None
    window = model.config.max_position_embeddings
    rows = _windows(run, tokenizer, tokens, window)
    chosen = _choices(model, rows, window, ops=ops)
    layers = {
        layer: [
            _taken(layer, expert, count_VE, rows, expert_of, tokenizer)
            for expert in range(model.config.num_experts)
        ]
        for layer, (count_VE, expert_of) in chosen.items()
    }
    return ExpertTokens(checkpoint.name, sum(map(len, rows)), layers)


def _windows(run: Path, tokenizer: Tokenizer, tokens: int, window: int) -> list[IntArray]:
    """Held-out token ids, cut into windows; every domain gives as many tokens."""
    domains = validation_domains(run)
    each = max(1, tokens // max(1, len(domains)))
    rows = []
    for domain in domains:
        documents, left = [], BYTES_PER_TOKEN * each
        for document in domain.documents:
            if left <= 0:
                break
            documents.append(document[:left])
            left -= len(documents[-1])
        token_W = tokenise(documents, tokenizer)[:each]
        rows += [token_W[first : first + window] for first in range(0, len(token_W), window)]
    return rows


def _choices(
    model: Model, rows: list[IntArray], window: int, *, ops: Operations
) -> Mapping[int, tuple[IntArray, list[IntArray]]]:
    """For each MoE layer how often each token went to each expert, and each window's experts."""
    config = model.config
    found: dict[int, tuple[IntArray, list[IntArray]]] = {}
    per_batch = max(1, AT_ONCE // window)
    whole = [row for row in rows if len(row) == window]
    batches = [whole[first : first + per_batch] for first in range(0, len(whole), per_batch)]
    order = [row for batch in batches for row in batch]
    for row in rows:
        if len(row) < window:
            batches.append([row])
            order.append(row)
    rows[:] = order
    for batch in batches:
        id_BT = ops.to_device(checked_ids(np.array(batch), config))
        with ops.scope():
            _, cache = forward(model, id_BT, None, drop=False, ops=ops)
            for layer, block in enumerate(cache.blocks):
                if isinstance(block.feed_forward, MoeCache):
                    expert_MK = ops.to_host(block.feed_forward.routing.expert_MK).copy()
                    count_VE, places = found.setdefault(
                        layer, (np.zeros((config.vocab_size, config.num_experts), np.int64), [])
                    )
                    of_token = expert_MK.reshape(len(batch), len(batch[0]), -1)
                    np.add.at(count_VE, (np.array(batch)[..., None], of_token), 1)
                    places += list(of_token)
    return found


def _taken(
    layer: int,
    expert: int,
    count_VE: IntArray,
    rows: list[IntArray],
    places: list[IntArray],
    tokenizer: Tokenizer,
) -> Taken:
    """What one expert takes.

    places: for each window, the experts that each of its tokens went to.
    """
    count_V = count_VE.sum(axis=1)
    share = float(count_VE[:, expert].sum() / max(1, count_V.sum()))
    expected_V = share * count_V
    seen_V = count_VE[:, expert]
    least = LEAST * places[0].shape[1] if places else 0  # a token makes so many choices
    usable = np.flatnonzero((seen_V > expected_V) & (count_V >= least))
    score = (seen_V[usable] - expected_V[usable]) / np.sqrt(expected_V[usable])
    best = usable[np.argsort(-score, kind="stable")[:SHOWN]]
    return Taken(
        layer,
        expert,
        share,
        [
            OverRepresented(
                visible(tokenizer, [int(token)]),
                float(seen_V[token] / expected_V[token]),
                int(seen_V[token]),
            )
            for token in best
        ],
        [_example(int(token), expert, rows, places, tokenizer) for token in best[:EXAMPLES]],
    )


def _example(
    token: int, expert: int, rows: list[IntArray], places: list[IntArray], tokenizer: Tokenizer
) -> Example:
    """The first place where the token went to the expert."""
    for row, of_token in zip(rows, places, strict=True):
        here = np.flatnonzero((row == token) & (of_token == expert).any(axis=1))
        if len(here):
            i = int(here[0])
            return Example(
                visible(tokenizer, row[max(0, i - CONTEXT) : i].tolist()),
                visible(tokenizer, [token]),
                visible(tokenizer, row[i + 1 : i + 1 + CONTEXT].tolist()),
            )
    raise AssertionError("a token that was counted is somewhere")


def visible(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Their text on one line; what would not show is escaped, special tokens by their names."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
