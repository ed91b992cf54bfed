"""Text to token ids, fast where the tokenizer allows it.

A byte-level BPE of GPT-2's kind never joins what stands before white space with what stands after its
beginning. So the text is cut there, each different segment is encoded once by the `tokenizers` library,
and the rest is looking up: some ten times as fast as encoding everything, with the same ids. Segments
of ASCII are cut into words, all that follow one another at once (see `ascii_words`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from mhmoe_np.data.ascii_words import GPT2_WORDS, TRAINED_WORDS, AsciiWords
from mhmoe_np.data.interruptible import interruptible
from mhmoe_np.data.known_ids import KnownIds
from mhmoe_np.data.pieces import WHITE_SPACE
from mhmoe_np.data.tokenizer import TRAINED_PATTERN, id_count
from mhmoe_np.errors import UserError
from mhmoe_np.types import IntArray

DtypeName = Literal["uint16", "uint32"]
# The byte order is part of the stores' format.
DTYPES: dict[DtypeName, np.dtype[np.unsignedinteger[Any]]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
LEAST_ID_BYTES = 2 / 8  # of a byte of text: a token has two, and stands for eight at most as a rule
# White space, then what is none. Behind a word of Latin letters punctuation is a segment of its own: so
# fewer segments differ.
SEGMENT = re.compile(
    rf" [A-Za-z]+(?=[\n -/:-@\[-`{{-~])|[{WHITE_SPACE}]*[^{WHITE_SPACE}]+|[{WHITE_SPACE}]+"
)
# The same, but segments of ASCII that follow one another are one. Not by possessive quantifiers: Python
# 3.11 had mistakes in them until 3.11.5.
ASCII_RUN = rf"(?:[ \t-\r]*[^{WHITE_SPACE}\x80-\U0010ffff]+(?=[{WHITE_SPACE}]|\Z))+"
SEGMENT_OR_RUN = re.compile(f"{ASCII_RUN}|{SEGMENT.pattern}")
MOST_SEGMENTS = 100_000  # remembered


def dtype_name(tokenizer: Tokenizer) -> DtypeName:
    """The narrowest type of number that holds every id."""
    return "uint16" if id_count(tokenizer) <= 1 << 16 else "uint32"


class Encoder:
    """Encodes texts without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` comes from `train_tokenizer` or `load_tokenizer`.

        Raises UserError: it has an empty vocabulary.
        """
        self._tokenizer = tokenizer
        self.dtype = DTYPES[dtype_name(tokenizer)]
        self._cut = cut_of(tokenizer)
        words = self._cut and self._cut.ascii_words
        self._ascii = words and AsciiWords(tokenizer, words, width=self.dtype.itemsize)
        self._known = KnownIds(MOST_SEGMENTS)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, in the bytes of an array of `dtype`.

        What a signal's handler raises ends it, as in `interruptible`.

        Raises UserError: the tokenizer cannot encode a text.
        """
        if self._cut is None:
            return self._encoded(texts)
        known, by_words = self._known, self._ascii is not None
        known.make_room()
        cut = (SEGMENT_OR_RUN if by_words else SEGMENT).findall
        pieces = [[text] if by_words and text.isascii() else cut(text) for text in texts]
        self._learn(
            {
                piece: None
                for of_text in pieces
                for piece in of_text
                if piece not in known and not (by_words and piece.isascii())
            }
        )
        ids = self._ids if by_words else known.__getitem__
        return [b"".join(map(ids, of_text)) for of_text in pieces]

    def _learn(self, new: Collection[str]) -> None:
        """Encode segments that are not known yet."""
        if new:
            for segment, ids in zip(new, self._encoded(list(new)), strict=True):
                self._known.learn(segment, ids)

    def _ids(self, piece: str) -> bytes:
        return self._ascii_ids(piece) if piece.isascii() else self._known[piece]

    def _ascii_ids(self, text: str) -> bytes:
        assert self._ascii is not None
        try:
            return self._ascii.ids(text)
        except Exception as error:  # The library raises nothing narrower.
            raise _cannot_encode(error) from None

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        # One array of all: thousands of small ones would take longer than the encoding.
        ids: list[int] = []
        ends = [0]
        for encoding in encode_batch(self._tokenizer, texts, add_special_tokens=False):
            ids += encoding.ids
            ends.append(len(ids))
        width, together = self.dtype.itemsize, np.array(ids, dtype=self.dtype).tobytes()
        return [together[width * first : width * end] for first, end in pairwise(ends)]

    def array(self, encoded: bytes) -> IntArray:
        """The ids that `encode` gave as bytes, read-only [W]."""
        return np.frombuffer(encoded, dtype=self.dtype)


def encode_batch(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[Encoding]:
    """The library's encodings; what a signal's handler raises ends the wait for them.

    Raises UserError: the tokenizer cannot encode a text.
    """

    def encode() -> list[Encoding]:
        # The refusal is made here, not around the wait: what a handler raises is no fault of the text.
        try:
            return tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # The library raises nothing narrower.
            raise _cannot_encode(error) from None

    return interruptible(encode)


def _cannot_encode(error: Exception) -> UserError:
    return UserError(f"tokenizer: cannot encode the text: {error}; use a byte-level tokenizer")


class Cut(NamedTuple):
    """How a BPE's text is cut before its pairs are merged.

    Attributes:
        ascii_words: how text of ASCII alone is; None: otherwise than those that `ascii_words` knows.
    """

    ascii_words: re.Pattern[str] | None


def cut_of(tokenizer: Tokenizer) -> Cut | None:
    """How a text is cut where its ids are those of its segments, one after the other; None: elsewhere.

    So it is for a BPE whose text is cut as GPT-2's is, or as that of the tokenizers trained here.
    """
    try:
        parts = json.loads(tokenizer.to_str())
    except Exception:  # A tokenizer that is none of a file's: the library raises nothing narrower.
        return None
    model, cuts = parts["model"], parts["pre_tokenizer"] or {}
    steps = cuts.get("pretokenizers", []) if cuts.get("type") == "Sequence" else [cuts]
    kinds = [step.get("type") for step in steps]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    splits = [step for step in steps if step.get("type") == "Split"]
    if not (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and parts["normalizer"] is None
        and all(token["special"] for token in parts["added_tokens"])
        and set(kinds) <= {"ByteLevel", "Split", "Digits"}
        and len(byte_level) == 1
        and not byte_level[0]["add_prefix_space"]
        and (byte_level[0]["use_regex"] or splits)
        and all(
            step["pattern"] == {"Regex": TRAINED_PATTERN} and step["behavior"] == "Isolated"
            for step in splits
        )
    ):
        return None
    if kinds == ["ByteLevel"]:
        return Cut(GPT2_WORDS)
    if kinds == ["Split", "ByteLevel"] and not byte_level[0]["use_regex"]:
        return Cut(TRAINED_WORDS)
    return Cut(None)
