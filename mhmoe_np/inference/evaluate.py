"""Perplexity of a text: per token, word and byte, and bits per byte.

Which tokens are scored is the protocol's (see `protocols`). Balance and z-loss are never part of it,
and capacity never applies [D4], so the result does not depend on how many windows go at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.tokenised_text import TokenisedText
from mhmoe_np.data.tokenizer import tokenizer_sha256
from mhmoe_np.errors import UserError
from mhmoe_np.inference.protocols import Protocol
from mhmoe_np.inference.window_losses import window_losses
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.types import FloatArray, IntArray

BATCH_TOKENS = 4096  # that go through the model at once


@dataclass(frozen=True)
class DomainScore:
    """What a text scored.

    Attributes:
        nll: in nats, the sum over the scored tokens.
        standard_error: of nll / tokens, over documents (see `standard_error`); None: of one alone.
        tokens: that were scored.
        text_tokens: of the whole text, with an end of text between documents.
        words, bytes: of the whole text; with `lm-eval-rolling` as lm-evaluation-harness counts them.
        documents: of the text.
        corpus_sha256: see `TokenisedText`.
        whole_text: whether the protocol leaves out no token that has another before it.
    """

    nll: float
    standard_error: float | None
    tokens: int
    text_tokens: int
    words: int
    bytes: int
    documents: int
    corpus_sha256: str
    whole_text: bool

    def as_dict(self) -> dict[str, Any]:
        """The counts and the derived figures; null where one exceeds a float.

        Those per word and byte are null where tokens of the text were left out.
        """
        values = {**asdict(self), "mean_nll": self.nll / self.tokens}
        token_ppl, whole = _exp(self.nll / self.tokens), self.whole_text
        values["token_ppl"] = token_ppl
        values["token_ppl_standard_error"] = (
            None
            if token_ppl is None or self.standard_error is None
            else token_ppl * self.standard_error
        )
        values["word_ppl"] = _exp(self.nll / max(1, self.words)) if whole else None
        values["byte_ppl"] = _exp(self.nll / self.bytes) if whole else None
        values["bits_per_byte"] = self.nll / self.bytes / math.log(2) if whole else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The score that `as_dict` made `values` of.

        Raises KeyError: they are not of a score.
        """
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def _exp(x: float) -> float | None:
    try:
        return math.exp(x)
    except OverflowError:
        return None


def scores_as_dict(
    scores: Mapping[str, DomainScore], protocol: Protocol, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Scores by domain as JSON has them, with all that they must say to be compared."""
    return {
        **protocol.as_dict(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "domains": {name: score.as_dict() for name, score in scores.items()},
    }


def standard_error(nll_of_documents: FloatArray, tokens_of_documents: IntArray) -> float | None:
    """The standard error of the mean NLL of a token, in nats, with documents as the sample.

    A document's tokens are not independent, documents about are. The mean r = sum(nll) / sum(n) is a
    ratio of two sums over the D documents of which a token was scored, n[d] tokens with nll[d] nats in
    all, and to first order its standard error is

        sqrt(D / (D - 1) * sum((nll[d] - r * n[d])**2)) / sum(n)

    That of the perplexity exp(r) is exp(r) times it. None: there are fewer than two documents.
    """
    nll, n = nll_of_documents[tokens_of_documents > 0], tokens_of_documents[tokens_of_documents > 0]
    if len(n) < 2:
        return None
    left = nll - nll.sum() / n.sum() * n
    return math.sqrt(len(n) / (len(n) - 1) * float((left**2).sum())) / int(n.sum())


def score_stream(
    model: Model, token_W: IntArray, *, window: int, batch_tokens: int, ops: Operations
) -> float:
    """Total NLL in nats of token_W[1:], by the protocol `disjoint`.

    window: inputs of one window; batch_tokens: about how many inputs go through the model at once.
    """
    windows = Protocol("disjoint", window).windows(np.array([len(token_W)]))
    found = window_losses(
        model, token_W, windows, bos_token_id=None, batch_tokens=batch_tokens, ops=ops
    )
    return sum(float(losses.sum(dtype=np.float64)) for _, losses, _ in found)


def check_scores(text: TokenisedText, *, vocab_size: int) -> None:
    """Make sure that a text can be scored.

    Raises UserError: there are fewer than two tokens, or one that the model lacks.
    """
    if len(text.token_W) < 2:
        raise UserError(f"domain {text.name}: one token alone cannot be scored; give more text")
    if text.largest_id >= vocab_size:
        raise UserError(
            f"domain {text.name}: token id {text.largest_id} is beyond the model's vocab_size "
            f"{vocab_size}; the tokenizer is not the model's"
        )


def evaluate(
    model: Model,
    text: TokenisedText,
    *,
    ops: Operations,
    protocol: Protocol | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress = unseen,
) -> DomainScore:
    """Score a text.

    protocol: None: `disjoint` windows of the model's `max_position_embeddings`.
    on_progress: is told how many tokens are scored.

    Raises UserError: the text is too short for the protocol, has ids that the model lacks, so many
    tokens at once do not fit into memory, or the NLL is not finite.
    """
    protocol = protocol or Protocol("disjoint", model.config.max_position_embeddings)
    check_scores(text, vocab_size=model.config.vocab_size)
    total = len(text.token_W)
    if (
        protocol.name == "llama-cpp"
        and total + (protocol.bos_token_id is not None) < 2 * protocol.window
    ):
        raise UserError(
            f"domain {text.name}: has {total:,} tokens; llama-cpp needs two windows of "
            f"{protocol.window:,}: give more text or a smaller --window"
        )
    at_once = min(max(batch_tokens, protocol.window), total)
    check_memory(
        2 * 4 * at_once * model.config.hidden_size,  # what enters a layer, and what leaves it
        f"domain {text.name}: the activations of {at_once:,} tokens at once need more than",
        remedy=f"lower --batch-tokens {batch_tokens}, or the model's max_position_embeddings",
    )
    # A document owns the end of text behind it.
    ends = np.cumsum(text.tokens_of_documents + 1)
    nll_of_documents = np.zeros(len(ends))
    tokens_of_documents = np.zeros(len(ends), np.int64)
    expected = sum(window.scored for window in protocol.windows(text.tokens_of_documents))
    scored = counting(on_progress, f"scoring {text.name}", expected)
    for window, losses, _ in window_losses(
        model,
        text.token_W,
        protocol.windows(text.tokens_of_documents),
        bos_token_id=protocol.bos_token_id,
        batch_tokens=batch_tokens,
        ops=ops,
    ):
        owners = np.searchsorted(ends, np.arange(window.end - window.scored, window.end), side="right")
        np.add.at(nll_of_documents, owners, losses)
        np.add.at(tokens_of_documents, owners, 1)
        scored(window.scored)
    nll = float(nll_of_documents.sum())
    if not math.isfinite(nll):
        raise UserError(
            f"domain {text.name}: its NLL is not finite ({nll}); the weights are damaged or too "
            "large for float32: take another checkpoint"
        )
    as_the_harness = protocol.name == "lm-eval-rolling"
    return DomainScore(
        nll=nll,
        standard_error=standard_error(nll_of_documents, tokens_of_documents),
        tokens=int(tokens_of_documents.sum()),
        text_tokens=total,
        words=text.split_words if as_the_harness else text.word_count,
        bytes=text.document_bytes if as_the_harness else text.byte_count,
        documents=len(ends),
        corpus_sha256=text.corpus_sha256,
        whole_text=protocol.scores_the_whole_text,
    )
