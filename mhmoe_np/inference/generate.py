"""Continuing prompts, token by token, several at once.

The prompts of a batch begin at the same position. Up to the length of the shortest they are read
together; from there each position adds one token to every text: a prompt that is longer gives its own
next one, the others the one that was drawn. So nothing is padded, and each text is what it would be
alone, to the rounding of products with another number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mhmoe_np.data.tokenise import tokenise_prompt
from mhmoe_np.data.tokenizer import end_of_text_id, id_count
from mhmoe_np.errors import UserError
from mhmoe_np.inference.sampling import Sampling, next_token
from mhmoe_np.inference.stop_strings import StopStrings
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.head import ExactHead, HeadDtype, int8_head
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.bfloat16 import BFloat16Weight, to_bfloat16
from mhmoe_np.operations.table import Operations, Weight
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.types import FloatArray, IntArray

FinishReason = Literal["end_of_text", "stop", "length", "positions"]
"""A text ended by itself, before a stop string, at `max_new_tokens`, or with the model's positions."""


Head: TypeAlias = Weight | ExactHead
"""What logits are computed by."""


class Limits(NamedTuple):
    """Where a text ends, at the latest.

    end_of_text: ids that end a text, as a checkpoint says them; none: the tokenizer's own.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    end_of_text: tuple[int, ...] = ()


@dataclass
class Continuation:
    """One text in the making.

    token_ids are those that were drawn, without the end of text and with those of a stop string; text
    is what they say, without a stop string and what follows it.
    """

    prompt: str
    seed: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None  # None: it goes on


class Prompt(NamedTuple):
    """The beginning of a text, and how it goes on."""

    text: str
    id_T: IntArray
    sampling: Sampling


def prompt_of(
    text: str,
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    end_of_text: tuple[int, ...] = (),
    config: ModelConfig,
) -> Prompt:
    """What the model is given for `text`.

    For an empty one, that starts a new text, it is what the tokenizer puts before every text, or else
    the first end-of-text token. end_of_text: as in `Limits`.

    Raises UserError: the sampling is no such numbers; the text makes no token, one that the model
    lacks, or leaves no position for a new one.
    """
    sampling.check()
    shown = f"prompt {text if len(text) <= 40 else text[:40] + '...'!r}"
    id_T = tokenise_prompt(text, tokenizer)
    if not text and not len(id_T):
        id_T = np.array(_ends(end_of_text, tokenizer)[:1])
    if not len(id_T):
        raise UserError(f"{shown}: the model's tokenizer makes no token of it; give another one")
    if int(id_T.max()) >= config.vocab_size:
        raise UserError(
            f"{shown}: token id {int(id_T.max())} is beyond the model's vocab_size "
            f"{config.vocab_size}; the tokenizer is not the model's"
        )
    if len(id_T) >= config.max_position_embeddings:
        raise UserError(
            f"{shown}: its {len(id_T)} tokens leave no room in the model's "
            f"{config.max_position_embeddings} positions; shorten it"
        )
    return Prompt(text, id_T, sampling)


def _ends(end_of_text: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    return end_of_text or (end_of_text_id(tokenizer),)


class _Text:
    """A continuation with what makes it."""

    def __init__(self, prompt: Prompt, limits: Limits, tokenizer: Tokenizer, positions: int) -> None:
        self.made = Continuation(prompt.text, prompt.sampling.seed)
        self.prompt_length = len(prompt.id_T)
        self.most_positions = min(positions, self.prompt_length + limits.max_new_tokens)
        # At least one is drawn.
        self._id_T = np.empty(max(self.most_positions, self.prompt_length + 1), np.int64)
        self._id_T[: self.prompt_length] = prompt.id_T
        self._length = self.prompt_length
        self.sampling, self._limits, self._tokenizer = prompt.sampling, limits, tokenizer
        self._rng = np.random.default_rng(prompt.sampling.seed)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._stop = StopStrings(limits.stop)

    @property
    def finished(self) -> bool:
        return self.made.finish_reason is not None

    def id_at(self, position: int) -> int:
        """The token that stands there; behind the end of the text the last one again, for nobody."""
        return int(self._id_T[min(position, self._length - 1)])

    def extend(self, logits_V: FloatArray) -> str:
        """Draw a token; the text that can be shown now."""
        token = next_token(logits_V, self.sampling, self._id_T[: self._length], self._rng)
        if token in self._limits.end_of_text:
            return self._show(self._stop.rest(), "end_of_text")
        self._id_T[self._length] = token
        self._length += 1
        self.made.token_ids.append(token)
        piece = self._stop.through(_decoded(self._stream, self._tokenizer, token) or "")
        if self._stop.found:
            return self._show(piece, "stop")
        if self._length < self.most_positions:
            return self._show(piece, None)
        at_limit = len(self.made.token_ids) == self._limits.max_new_tokens
        return self._show(piece + self._stop.rest(), "length" if at_limit else "positions")

    def _show(self, piece: str, reason: FinishReason | None) -> str:
        self.made.text += piece
        self.made.finish_reason = reason
        return piece


class Generation:
    """Some texts that are made together, a token of each a step."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        limits: Limits,
        head: Head | None = None,
        joined: bool = True,
        ops: Operations,
    ) -> None:
        """Of a model, its tokenizer and prompts for them.

        head: see `head_of`; None: the model's output head in float32. joined: as of `KeyValueCache`.

        Raises UserError: a stop string is empty; the cache of keys and values of so many texts does not
        fit into memory.
        """
        limits = limits._replace(end_of_text=_ends(limits.end_of_text, tokenizer))
        positions = model.config.max_position_embeddings
        self._texts = [_Text(prompt, limits, tokenizer, positions) for prompt in prompts]
        self._known, self._ops = id_count(tokenizer), ops
        self._exact = head if isinstance(head, ExactHead) else None
        weight = head.weight if isinstance(head, ExactHead) else head
        self._cache = _room(self._texts, model, weight, joined, ops)

    @property
    def continuations(self) -> list[Continuation]:
        """As far as they are, in the order of the prompts."""
        return [text.made for text in self._texts]

    @property
    def finished(self) -> bool:
        """Whether all texts have ended."""
        return all(text.finished for text in self._texts)

    def step(self) -> list[str]:
        """Read the next position of every text; the text that each shows more of by it.

        Raises UserError: the logits are not finite, or the tokenizer cannot decode what was drawn.
        """
        ops, cache = self._ops, self._cache
        first = cache.length
        last = first + 1 if first else min(text.prompt_length for text in self._texts)
        id_BT = np.array([[text.id_at(t) for t in range(first, last)] for text in self._texts])
        shown = []
        with ops.scope():
            logits_BV = ops.to_host(cache.extend(id_BT))
            for row, (text, logits_V) in enumerate(zip(self._texts, logits_BV, strict=True)):
                if last < text.prompt_length or text.finished:
                    shown.append("")
                    continue
                if not np.isfinite(logits_V).all():
                    raise UserError(
                        "the logits are not finite; the weights are damaged or too large for float32: "
                        "take another checkpoint"
                    )
                shown.append(text.extend(self._settled(row, logits_V[: self._known])))
        return shown

    def _settled(self, row: int, logits_V: FloatArray) -> FloatArray:
        """The logits to draw from; of an exact head these were scores."""
        count = self._texts[row].sampling.most_probable
        if self._exact is None or count is None or self._cache.last_BD is None:
            return logits_V
        return self._exact.logits(self._cache.last_BD, row, logits_V, count)


def check_head(dtype: HeadDtype, sampling: Sampling) -> None:
    """Refuse an exact head where the sampling depends on more than the most probable tokens.

    Raises UserError
    """
    if dtype == "exact" and sampling.most_probable is None:
        raise UserError(
            "--head-dtype exact: finds the most probable tokens alone; give --temperature 0 or "
            "--top-k K, and no --repetition-penalty"
        )


def head_of(model: Model, dtype: HeadDtype, sampling: Sampling, *, ops: Operations) -> Head | None:
    """The output head as generation multiplies by it; None: as it is, in float32.

    dtype: `bfloat16` makes the logits those of rounded weights, `int8` of 8-bit weights and
    activations; `exact` gives the tokens of float32 by 8-bit scores, where they are the most probable
    ones.

    Raises UserError: see `check_head`; a weight is too large.
    """
    if dtype == "float32":
        return None
    if dtype == "bfloat16":
        bits = to_bfloat16(ops.to_host(model.weights.output_VD)).bits
        return BFloat16Weight(ops.to_device(bits))
    if dtype == "int8":
        weight = int8_head(ops.to_host(model.weights.output_VD))
        return weight._replace(q=ops.to_device(weight.q), scale=ops.to_device(weight.scale))
    check_head(dtype, sampling)
    return ExactHead(model.weights.output_VD, ops=ops)


def _room(
    texts: list[_Text], model: Model, head: Weight | None, joined: bool, ops: Operations
) -> KeyValueCache:
    # Nobody reads what follows the last token.
    config, positions = model.config, max(text.most_positions for text in texts) - 1
    per_position = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    check_memory(
        np.dtype(model.weights.dtype).itemsize * per_position * positions * len(texts),
        f"the keys and values of {len(texts)} texts of {positions:,} tokens at once need",
        remedy="lower the batch size or the number of new tokens",
    )
    return KeyValueCache(
        model, sequences=len(texts), positions=positions, head=head, joined=joined, ops=ops
    )


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
    end_of_text: tuple[int, ...] = (),
    joined: bool = True,
    ops: Operations,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of text, as each becomes whole.

    Ends after `max_new_tokens`, at an end-of-text token, before a string of `stop`, or when all
    positions are used. An empty prompt starts a new text.

    end_of_text: as in `Limits`; joined: as of `KeyValueCache`.

    Raises UserError: as `prompt_of` and `Generation`; while it is read, as its `step`.
    """
    first = prompt_of(prompt, tokenizer, sampling, end_of_text=end_of_text, config=model.config)
    limits = Limits(max_new_tokens, stop, end_of_text)
    generation = Generation(model, tokenizer, [first], limits=limits, joined=joined, ops=ops)

    def pieces() -> Iterator[str]:
        while not generation.finished:
            (piece,) = generation.step()
            if piece:
                yield piece

    return pieces()


class Texts(NamedTuple):
    """The continuations of some prompts, in their order, and how fast they came."""

    continuations: list[Continuation]
    seconds: float  # reading the prompts with the model included

    @property
    def tokens(self) -> int:
        """Tokens that were drawn."""
        return sum(len(made.token_ids) for made in self.continuations)

    @property
    def tokens_per_s(self) -> float:
        """Drawn tokens a second, of all texts together."""
        return self.tokens / self.seconds


def generate_all(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    limits: Limits,
    sampling: Sampling,
    batch_size: int,
    head: Head | None = None,
    on_progress: OnProgress = unseen,
    ops: Operations,
) -> Texts:
    """Continue every prompt, `batch_size` at once, those of similar length together.

    The i-th prompt, from 0, is sampled with seed `sampling.seed` + i, whatever stands beside it.
    head: as in `Generation`.
    on_progress: counts tokens; a text that ends early counts as long as it might have been.

    Raises UserError: as `prompt_of` for any prompt, before a text is begun; as `Generation` and `step`.
    """
    ends, config = limits.end_of_text, model.config
    given = [
        prompt_of(
            prompt,
            tokenizer,
            sampling._replace(seed=sampling.seed + i),
            end_of_text=ends,
            config=config,
        )
        for i, prompt in enumerate(prompts)
    ]
    # The longest first: if memory is short, it shows at once.
    order = sorted(range(len(given)), key=lambda i: -len(given[i].id_T))
    made: dict[int, Continuation] = {}
    started, most = time.perf_counter(), limits.max_new_tokens
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        together = [given[i] for i in places]
        generation = Generation(model, tokenizer, together, limits=limits, head=head, ops=ops)
        while not generation.finished:
            generation.step()
            done = sum(
                most if text.finish_reason else len(text.token_ids) for text in generation.continuations
            )
            on_progress("generating", most * first + done, most * len(given))
        made.update(zip(places, generation.continuations, strict=True))
    return Texts([made[i] for i in range(len(given))], time.perf_counter() - started)


def _decoded(stream: DecodeStream, tokenizer: Tokenizer, token: int) -> str | None:
    try:
        text: str | None = stream.step(tokenizer, token)
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"tokenizer: cannot decode token {token}: {error}; give the model's") from None
    return text
