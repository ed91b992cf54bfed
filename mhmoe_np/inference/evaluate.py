"""Perplexity of a text: per token, word and byte, and bits per byte.

Protocol: the documents of a domain are joined by the end-of-text token into one stream, cut into
disjoint windows; every token after the first of the stream is scored once, given what precedes it in
its window. Balance and z-loss are never part of it, and capacity never applies [D4], so the result
does not depend on how many windows go at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.documents import Domain
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.errors import UserError
from mhmoe_np.model.language_model import Model, check_positions, known_ids, last_hidden
from mhmoe_np.operations.table import Operations
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.types import FloatArray, IntArray

BATCH_TOKENS = 4096  # that go through the model at once


@dataclass(frozen=True)
class DomainScore:
    """Total NLL in nats over the scored tokens; words and bytes of the original text."""

    nll: float
    tokens: int
    words: int
    bytes: int

    def as_dict(self) -> dict[str, float | int | None]:
        """The counts and the four derived figures; null where one exceeds a float."""
        return {
            **asdict(self),
            "token_ppl": _exp(self.nll / self.tokens),
            "word_ppl": _exp(self.nll / max(1, self.words)),
            "byte_ppl": _exp(self.nll / self.bytes),
            "bits_per_byte": self.nll / self.bytes / math.log(2),
        }


def _exp(x: float) -> float | None:
    try:
        return math.exp(x)
    except OverflowError:
        return None


def score_stream(
    model: Model, token_W: IntArray, *, window: int, batch_tokens: int, ops: Operations
) -> float:
    """Total NLL in nats of token_W[1:].

    window: inputs of one window; batch_tokens: about how many inputs go through the model at once.
    """
    inputs = len(token_W) - 1
    whole = inputs // window
    check_positions(min(window, inputs), model.config)
    token_W = ops.to_device(known_ids(token_W, model.config))
    nll_1 = ops.zeros((1,), np.float64)
    per_batch = max(1, batch_tokens // window)
    for first in range(0, whole, per_batch):
        rows = min(per_batch, whole - first)
        start = first * window
        _add_nll(model, token_W[start : start + rows * window + 1], rows, nll_1, ops=ops)
    if inputs % window:
        _add_nll(model, token_W[whole * window :], 1, nll_1, ops=ops)
    return float(ops.to_host(nll_1)[0])


def _add_nll(
    model: Model, token_W: IntArray, windows: int, nll_1: FloatArray, *, ops: Operations
) -> None:
    """Add the NLL of equal windows in a row, each sharing its last token with the next."""
    with ops.scope():
        x_ND = last_hidden(model, token_W[:-1].reshape(windows, -1), ops=ops)
        ops.add_sum(ops.token_nll(x_ND, model.weights.output_VD, token_W[1:]), nll_1)


def scored_tokens(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int
) -> IntArray:
    """The stream of a domain's tokens, token_W.

    Raises UserError: there are fewer than two, or one that the model lacks.
    """
    token_W = tokenise(documents, tokenizer)
    if len(token_W) < 2:
        raise UserError(f"domain {name}: one token alone cannot be scored; give more text")
    if int(token_W.max()) >= vocab_size:
        raise UserError(
            f"domain {name}: token id {int(token_W.max())} is beyond the model's vocab_size "
            f"{vocab_size}; the tokenizer is not the model's"
        )
    return token_W


def evaluate(
    model: Model,
    domain: Domain,
    tokenizer: Tokenizer,
    *,
    ops: Operations,
    batch_tokens: int = BATCH_TOKENS,
) -> DomainScore:
    """Score a domain in windows of the model's `max_position_embeddings`.

    Raises UserError: the text is a single token, its tokenizer knows ids the model lacks, so many
    tokens at once do not fit into memory, or the NLL is not finite.
    """
    token_W = scored_tokens(
        domain.name, domain.documents, tokenizer, vocab_size=model.config.vocab_size
    )
    window = model.config.max_position_embeddings
    at_once = min(max(batch_tokens, window), len(token_W))
    check_memory(
        2 * 4 * at_once * model.config.hidden_size,  # what enters a layer, and what leaves it
        f"domain {domain.name}: the activations of {at_once:,} tokens at once need more than",
        remedy=f"lower --batch-tokens {batch_tokens}, or the model's max_position_embeddings",
    )
    nll = score_stream(model, token_W, window=window, batch_tokens=batch_tokens, ops=ops)
    if not math.isfinite(nll):
        raise UserError(
            f"domain {domain.name}: its NLL is not finite ({nll}); the weights are damaged or too "
            "large for float32: take another checkpoint"
        )
    return DomainScore(nll, len(token_W) - 1, domain.word_count, domain.byte_count)
