"""Perplexity protocols: which tokens are scored, and what the model sees before each.

A protocol cuts a text's tokens into windows and scores the last tokens of each. The text is the stream
of a domain's documents with an end of text between neighbours. docs/perplexity.md has pictures.

    disjoint         windows side by side; each but the first token of the text is scored once
    stride           windows of a fixed length, each `stride` further; those tokens of a window that no
                     earlier one had are scored (transformers' "Perplexity of fixed-length models")
    lm-eval-rolling  each document by itself behind a beginning of text, every token of it scored once
                     (lm-evaluation-harness, `loglikelihood_rolling`)
    llama-cpp        whole windows side by side, the second half of each scored (`llama-perplexity`)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import IntArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ProtocolName: TypeAlias = Literal["disjoint", "stride", "lm-eval-rolling", "llama-cpp"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)


class Window(NamedTuple):
    """Tokens begin .. end-1 of the stream, of which the last `scored` are scored.

    The model is given all but the last of them, behind the beginning of text if `bos`.
    """

    begin: int
    end: int
    scored: int
    bos: bool

    @property
    def inputs(self) -> int:
        """How many tokens go into the model."""
        return self.end - self.begin - 1 + self.bos


@dataclass(frozen=True)
class Protocol:
    """How a text is scored.

    Attributes:
        window: tokens of one window: those that go into the model; with `stride` and `llama-cpp` the
            last one that is scored is of them.
        stride: tokens from one window's beginning to the next one's; None: another protocol.
        bos_token_id: begins every window, or every document with `lm-eval-rolling`; None: nothing does.
    """

    name: ProtocolName
    window: int
    stride: int | None = None
    bos_token_id: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """What a score must say to be compared."""
        return {
            "protocol": self.name,
            "window": self.window,
            "stride": self.stride,
            "bos": self.bos_token_id is not None,
            "bos_token_id": self.bos_token_id,
        }

    @property
    def scores_the_whole_text(self) -> bool:
        """Whether it leaves out no token that has another before it."""
        if self.name == "stride":
            return self.stride != self.window
        return self.name != "llama-cpp"

    def windows(self, lengths: IntArray) -> Iterator[Window]:
        """The windows of a text, in the order in which they are best scored.

        lengths: int64 [documents], the tokens of each; between two stands one more in the stream.
        """
        total = int(lengths.sum()) + len(lengths) - 1
        bos = self.bos_token_id is not None
        match self.name:
            case "disjoint":
                return _disjoint(total, self.window, bos)
            case "stride":
                assert self.stride is not None
                return _strided(total, self.window, self.stride, bos)
            case "lm-eval-rolling":
                return _rolling(lengths, self.window)
            case "llama-cpp":
                return _second_halves(total, self.window, bos)


def _disjoint(total: int, window: int, bos: bool) -> Iterator[Window]:
    """Without a beginning of text a window's last target is the next one's first input."""
    overlap = 0 if bos else 1
    for begin in range(0, total - overlap, window):
        end = min(begin + window + overlap, total)
        yield Window(begin, end, end - begin - overlap, bos)


def _strided(total: int, window: int, stride: int, bos: bool) -> Iterator[Window]:
    """The first token of a window is scored only where a beginning of text precedes it."""
    length, scored_to = window - bos, 0
    for begin in range(0, total, stride):
        end = min(begin + length, total)
        scored = min(end - scored_to, end - begin - (not bos))
        if scored:
            yield Window(begin, end, scored, bos)
        scored_to = end
        if end == total:
            break


def _rolling(lengths: IntArray, window: int) -> Iterator[Window]:
    """A document's last window is filled up with what precedes its targets.

    Documents of about one length follow each other: those of one batch are padded to the longest.
    """
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    for i in np.argsort(lengths, kind="stable"):
        start, length = int(starts[i]), int(lengths[i])
        first = min(window, length)
        if first:
            yield Window(start, start + first, first, bos=True)
        for scored_to in range(first, length, window):
            scored = min(window, length - scored_to)
            end = start + scored_to + scored
            yield Window(end - window - 1, end, scored, bos=False)


def _second_halves(total: int, window: int, bos: bool) -> Iterator[Window]:
    """A beginning of text stands before the stream, and in the place of each further window's first."""
    for chunk in range((total + bos) // window):
        begin = chunk * window
        yield Window(begin, begin + window - bos, window - 1 - window // 2, bos)


def choose_protocol(
    name: ProtocolName,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
) -> Protocol:
    """A protocol for a model; what is not said is as the protocol's own program has it.

    window: None: the model's `max_position_embeddings`.
    stride: None: half of the window.
    bos: whether a beginning of text stands before each window. None: with `lm-eval-rolling`, and with
    `llama-cpp` where the tokenizer begins every text with one. It is that one, else the end of text.

    Raises UserError: the window is longer than the model's or too short, the stride is not of the
    protocol or would leave tokens out, `lm-eval-rolling` without a beginning of text, or a beginning of
    text that the model lacks.
    """
    from mhmoe_np.data.tokenizer import end_of_text_id  # not for a command's --help

    most = config.max_position_embeddings
    window = most if window is None else window
    least = {"stride": 2, "llama-cpp": 3}.get(name, 1)
    if not least <= window <= most:
        raise UserError(
            f"--window {window}: must be {least} to the model's max_position_embeddings {most} with "
            f"--protocol {name}"
        )
    if name == "lm-eval-rolling" and bos is False:
        raise UserError(
            "--no-bos: lm-eval-rolling always begins with a beginning of text; leave it away"
        )
    own = _own_bos(tokenizer)
    if bos is None:
        bos = name == "lm-eval-rolling" or (name == "llama-cpp" and own is not None)
    bos_token_id = None
    if bos:
        bos_token_id = end_of_text_id(tokenizer) if own is None else own
        if bos_token_id >= config.vocab_size:
            raise UserError(
                f"--bos: the beginning of text, token {bos_token_id}, is beyond the model's vocab_size "
                f"{config.vocab_size}; the tokenizer is not the model's"
            )
    if name != "stride":
        if stride is not None:
            raise UserError(f"--stride {stride}: is of --protocol stride, not of {name}")
        return Protocol(name, window, None, bos_token_id)
    longest = window - bos
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= longest:
        raise UserError(
            f"--stride {stride}: must be 1 to {longest}, or tokens between two windows are left out"
        )
    return Protocol(name, window, stride, bos_token_id)


def _own_bos(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    from mhmoe_np.data.tokenise import tokenise_prompt

    text = "a"
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    begun = tokenise_prompt(text, tokenizer).tolist()
    return begun[0] if begun and begun[:1] != plain[:1] else None
