"""Documents as they come: whole, or in pieces where they are long."""

from __future__ import annotations

import re
from typing import NamedTuple

from mhmoe_np.types import IntArray

PIECE = 1 << 20  # characters, or tokens, of the longest piece
TAIL = 1 << 16  # characters at a piece's end in which a place to cut it is looked for
# Unicode's white space. Python's `\s` has four characters more, of which the tokenizers' has none.
WHITE_SPACE = r" \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LINE_END = re.compile(rf"(?<=[^{WHITE_SPACE}])\r?\n")
SPACE = re.compile(rf"(?<=[^{WHITE_SPACE}])[{WHITE_SPACE}]")


class Piece(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        content: text, or token ids [W].
        begins: whether a document begins with it; else it goes on with the one before.
    """

    content: str | IntArray
    begins: bool

    @property
    def size(self) -> int:
        """Bytes of UTF-8, or tokens."""
        if isinstance(self.content, str) and not self.content.isascii():
            return len(self.content.encode())
        return len(self.content)


def place_to_cut(text: str) -> int:
    """Where to cut the beginning of a long text off, at most `PIECE` characters.

    In front of white space that follows something else, at a line's end if there is one near: there
    byte-level tokenizers cut as well, so that the pieces have the tokens of the whole.
    """
    start = PIECE - TAIL
    tail = text[start - 1 : PIECE]
    for pattern in (LINE_END, SPACE):
        places = [match.start() for match in pattern.finditer(tail)]
        if places:
            return start - 1 + places[-1]
    return PIECE
