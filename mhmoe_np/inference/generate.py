"""Continuing a prompt, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mhmoe_np.data.tokenise import tokenise_prompt
from mhmoe_np.data.tokenizer import end_of_text_id, id_count
from mhmoe_np.errors import UserError
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray


class Sampling(NamedTuple):
    """How the next token is drawn; temperature 0 takes the most probable one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def next_token(logits_V: FloatArray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Draw from softmax(logits / temperature), of the top_k most probable, of the top_p nucleus.

    The nucleus is the smallest set of most probable tokens whose probabilities reach top_p
    (Holtzman et al., arXiv 1904.09751). Ties keep the lower id.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    order = np.argsort(-logits_V, kind="stable")[: sampling.top_k]
    sorted_V = logits_V[order].astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0: -inf, hence probability 0
        p = np.exp((sorted_V - sorted_V[0]) / sampling.temperature)
    p /= p.sum()
    if sampling.top_p is not None:
        nucleus = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        order, p = order[:nucleus], p[:nucleus] / p[:nucleus].sum()
    return int(order[rng.choice(len(order), p=p)])


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: tuple[int, ...] = (),
    ops: Operations,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of text, as each becomes whole.

    Ends after `max_new_tokens`, at an end-of-text token, or when all positions are used. An empty
    prompt starts a new text: the model is given what the tokenizer puts before every text, or else the
    first end-of-text token.

    end_of_text: ids that end a text, as a checkpoint says them; none: the tokenizer's own.

    Raises UserError: temperature or top_p is no such number; the prompt makes no token, one that the
    model lacks, or leaves no position for a new one. While it is read: the logits are not finite, or
    the tokenizer cannot decode what was drawn.
    """
    _check_sampling(sampling)
    config = model.config
    end_of_text = end_of_text or (end_of_text_id(tokenizer),)
    id_T = tokenise_prompt(prompt, tokenizer)
    if not prompt and not len(id_T):
        id_T = np.array(end_of_text[:1])
    if not len(id_T):
        raise UserError("--prompt: the model's tokenizer makes no token of it; give another one")
    if int(id_T.max()) >= config.vocab_size:
        raise UserError(
            f"--prompt: token id {int(id_T.max())} is beyond the model's vocab_size "
            f"{config.vocab_size}; the tokenizer is not the model's"
        )
    room = config.max_position_embeddings - len(id_T)
    if room < 1:
        raise UserError(
            f"--prompt: its {len(id_T)} tokens leave no room in the model's "
            f"{config.max_position_embeddings} positions; shorten it"
        )
    length = min(max_new_tokens, room)
    return _continuation(model, tokenizer, id_T, length, sampling, end_of_text, ops=ops)


def _check_sampling(sampling: Sampling) -> None:
    temperature, _, top_p, _ = sampling
    if not 0 <= temperature < math.inf:  # NaN is in no range
        raise UserError(f"temperature: {temperature} is not a finite number of at least 0; try 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not above 0 and at most 1; try 0.95")


def _continuation(
    model: Model,
    tokenizer: Tokenizer,
    id_T: IntArray,
    length: int,
    sampling: Sampling,
    end_of_text: tuple[int, ...],
    *,
    ops: Operations,
) -> Iterator[str]:
    known = id_count(tokenizer)
    rng = np.random.default_rng(sampling.seed)
    cache = KeyValueCache(model, sequences=1, positions=len(id_T) + length, ops=ops)
    stream = DecodeStream(skip_special_tokens=False)
    new_T = id_T.astype(np.int64)
    for _ in range(length):
        with ops.scope():
            logits_V = ops.to_host(cache.extend(new_T[None]))[0]
            if not np.isfinite(logits_V).all():
                raise UserError(
                    "the logits are not finite; the weights are damaged or too large for float32: take "
                    "another checkpoint"
                )
            token = next_token(logits_V[:known], sampling, rng)
        if token in end_of_text:
            return
        text = _decoded(stream, tokenizer, token)
        if text:
            yield text
        new_T = np.array([token])


def _decoded(stream: DecodeStream, tokenizer: Tokenizer, token: int) -> str | None:
    try:
        text: str | None = stream.step(tokenizer, token)
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"tokenizer: cannot decode token {token}: {error}; give the model's") from None
    return text
