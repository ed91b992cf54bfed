"""The ids of ASCII text, word by word: what the `tokenizers` library finds for it, and sooner.

Most of the library's time goes into cutting a text into words and keeping track of every character's
place. Here a regular expression cuts, and only the library's model, its merges, is asked, once a word.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from mhmoe_np.data.known_ids import KnownIds
from mhmoe_np.data.tokenizer import LONGEST_RUN

MOST_WORDS = 200_000  # remembered
# How byte-level tokenizers write ASCII's bytes: those that would not show as characters behind U+0100.
WRITTEN = {byte: chr(0x100 + byte) for byte in range(33)} | {127: chr(0x121)}


def words_pattern(run: str) -> re.Pattern[str]:
    """GPT-2's pattern for ASCII; run: how many characters of one kind are a word."""
    kinds = f" ?[A-Za-z]{run}", f" ?[0-9]{run}", rf" ?[^\sA-Za-z0-9]{run}"
    spaces = rf"\s{run}(?!\S)", rf"\s{run}"
    return re.compile("|".join(["'(?:[sdmt]|ll|ve|re)", *kinds, *spaces]), re.ASCII)


GPT2_WORDS, TRAINED_WORDS = words_pattern("+"), words_pattern(f"{{1,{LONGEST_RUN}}}")


class AsciiWords:
    """Encodes ASCII text for a byte-level BPE."""

    def __init__(self, tokenizer: Tokenizer, pattern: re.Pattern[str], *, width: int) -> None:
        """pattern: how the tokenizer cuts; width: bytes of an id."""
        self._pattern, self._known = pattern, _IdsOfWords(tokenizer, width)

    def ids(self, text: str) -> bytes:
        """The ids of a text, little-endian."""
        self._known.make_room()
        return b"".join(map(self._known.__getitem__, self._pattern.findall(text)))


class _IdsOfWords(KnownIds):
    """The model is asked for a word that is not known: no loop over those that are."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__(MOST_WORDS)
        self._model, self._width = tokenizer.model, width

    def __missing__(self, word: str) -> bytes:
        tokens = self._model.tokenize(word.translate(WRITTEN))
        ids = b"".join(token.id.to_bytes(self._width, "little") for token in tokens)
        self.learn(word, ids)
        return ids
