"""Which tokens an expert takes: those that it gets more often than its share of all choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from mhmoe_np.data.read_file import read_pieces
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import Model, checked_ids, forward
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.training.run_folder import held_out_domains
from mhmoe_np.types import FloatArray, IntArray

TOKENS = 8192  # of held-out text that are looked at, unless told otherwise
AT_ONCE = 2048  # tokens that go through the model together
BYTES_PER_TOKEN = 8  # more than a token has on average: so much text is enough
LEAST = 3  # occurrences below which a token says nothing
CHOICE_BYTES = 12  # an expert's number and its gate
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
    examples: list[Example]  # one of each of the first of them


class _Window(NamedTuple):
    """Held-out text as one layer sees it."""

    token_W: IntArray
    expert_WK: IntArray  # each token's, of all its heads
    gate_WK: FloatArray


class ExpertTokens(NamedTuple):
    """What all experts take."""

    checkpoint: str
    tokens: int  # looked at
    layers: dict[int, list[Taken]]


def expert_tokens(
    run: Path, *, tokens: int = TOKENS, ops: Operations, on_progress: OnProgress = unseen
) -> ExpertTokens | None:
    """Send held-out text through the newest checkpoint and see where it goes; None without experts.

    tokens: about how many, the same number of each domain's.
    on_progress: counts them.

    A token's choices are those of all its heads. Experts' tokens are ordered by (seen - expected) /
    sqrt(expected), so that rare tokens do not come first by chance.

    Raises UserError: the newest checkpoint is damaged or has no tokenizer, or so many tokens do not fit
    into memory.
    """
    if not checkpoints_of(run):
        return None
    checkpoint = find_checkpoint(run)
    model = load_model(checkpoint, np.float32, ops=ops)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    if not model.config.moe_layers:
        return None
    window = model.config.max_position_embeddings
    choices = model.config.moe_heads * model.config.num_experts_per_tok
    check_memory(
        tokens * choices * model.config.moe_layers * CHOICE_BYTES,
        f"--tokens {tokens}: the experts of so many tokens need about",
        remedy="lower it",
    )
    rows = _windows(run, tokenizer, tokens, window)
    stage = f"which tokens each expert of {run.absolute().name} takes"
    routed = counting(on_progress, stage, sum(map(len, rows)))
    layers = {
        layer: _layer(layer, windows, model.config, tokenizer)
        for layer, windows in _routed(model, rows, ops=ops, on_tokens=routed).items()
    }
    return ExpertTokens(checkpoint.name, sum(map(len, rows)), layers)


def _windows(run: Path, tokenizer: Tokenizer, tokens: int, window: int) -> list[IntArray]:
    """Held-out token ids, cut into windows; every domain gives as many tokens."""
    files = held_out_domains(run).values()
    each = max(1, tokens // max(1, len(files)))
    rows = []
    for file in files:
        token_W = tokenise(_beginning(file, BYTES_PER_TOKEN * each), tokenizer)[:each]
        rows += [token_W[first : first + window] for first in range(0, len(token_W), window)]
    return rows


def _beginning(file: Path, characters: int) -> list[str]:
    """So much of the documents of a file of text, the last one cut off."""
    documents: list[str] = []
    for piece in read_pieces(file):
        assert isinstance(piece.content, str)
        if piece.begins:
            documents.append("")
        documents[-1] += piece.content[:characters]
        characters -= len(piece.content)
        if characters <= 0:
            break
    return documents


def _routed(
    model: Model,
    rows: Sequence[IntArray],
    *,
    ops: Operations,
    on_tokens: Callable[[int], None],
) -> dict[int, list[_Window]]:
    """For each MoE layer where every token went; windows of one length go through together."""
    window = model.config.max_position_embeddings
    whole = [row for row in rows if len(row) == window]
    at_once = max(1, AT_ONCE // window)
    batches = [whole[first : first + at_once] for first in range(0, len(whole), at_once)]
    batches += [[row] for row in rows if len(row) < window]
    found: dict[int, list[_Window]] = {}
    for batch in batches:
        id_BT = ops.to_device(checked_ids(np.array(batch), model.config))
        with ops.scope():
            _, cache = forward(model, id_BT, None, drop=False, ops=ops)
            for layer, block in enumerate(cache.blocks):
                if isinstance(block.feed_forward, MoeCache):
                    routing = block.feed_forward.routing
                    shape = len(batch), len(batch[0]), -1
                    # Copies: the backend's memory is used again.
                    experts = ops.to_host(routing.expert_MK).reshape(shape).copy()
                    gates = ops.to_host(routing.gate_MK).reshape(shape).copy()
                    found.setdefault(layer, []).extend(map(_Window, batch, experts, gates))
        on_tokens(sum(map(len, batch)))
    return found


def _layer(
    layer: int, windows: Sequence[_Window], config: ModelConfig, tokenizer: Tokenizer
) -> list[Taken]:
    count_VE = np.zeros((config.vocab_size, config.num_experts), np.int64)
    for window in windows:
        np.add.at(count_VE, (window.token_W[:, None], window.expert_WK), 1)
    count_V = count_VE.sum(axis=1)
    least = LEAST * config.moe_heads * config.num_experts_per_tok  # a token makes so many choices
    taken = []
    for expert in range(config.num_experts):
        seen_V = count_VE[:, expert]
        share = float(seen_V.sum() / max(1, count_V.sum()))
        expected_V = share * count_V
        usable = np.flatnonzero((seen_V > expected_V) & (count_V >= least))
        score = (seen_V[usable] - expected_V[usable]) / np.sqrt(expected_V[usable])
        best = usable[np.argsort(-score, kind="stable")[:SHOWN]].tolist()
        tokens = [
            OverRepresented(
                visible(tokenizer, [token]),
                float(seen_V[token] / expected_V[token]),
                int(seen_V[token]),
            )
            for token in best
        ]
        examples = [_example(token, expert, windows, tokenizer) for token in best[:EXAMPLES]]
        taken.append(Taken(layer, expert, share, tokens, examples))
    return taken


def _example(token: int, expert: int, windows: Sequence[_Window], tokenizer: Tokenizer) -> Example:
    """The place where the token went to the expert with the largest gate."""
    places = []
    for window in windows:
        here_WK = (window.token_W[:, None] == token) & (window.expert_WK == expert)
        gate_W = np.where(here_WK, window.gate_WK, -1).max(axis=1)
        place = int(gate_W.argmax())
        places.append((float(gate_W[place]), place, window.token_W))
    _, place, token_W = max(places, key=lambda found: found[0])
    return Example(
        visible(tokenizer, token_W[max(0, place - CONTEXT) : place].tolist()),
        visible(tokenizer, [token]),
        visible(tokenizer, token_W[place + 1 : place + 1 + CONTEXT].tolist()),
    )


def visible(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Their text on one line; what would not show is escaped, special tokens by their names."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
