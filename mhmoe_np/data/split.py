"""Setting validation text aside, by document and reproducibly, without holding the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mhmoe_np.data.pieces import Piece
from mhmoe_np.errors import UserError
from mhmoe_np.types import BoolArray, IntArray

AT_A_TIME = 1 << 16  # documents that are Python's numbers at a time


class Split(NamedTuple):
    """Which of a domain's documents are held out.

    Attributes:
        held_out: a flag for each document, in order.
        cut: of a lone document, where in bytes (or tokens) its held-out end begins, about; None: no
            document is cut.
    """

    held_out: BoolArray
    cut: int | None = None


def split_by_size(size_of_document: IntArray, *, fraction: float, seed: int) -> Split:
    """Split one domain's documents, at least one and none empty, for training and validation.

    Documents are drawn in an order given by `seed` (0 or above); each goes to validation if the
    total then stays within `fraction` of the domain's bytes. If none fits, the shortest goes. A lone
    document is cut, its end going to validation. Fraction 0 gives no validation text.

    size_of_document: bytes of UTF-8, or tokens.

    Raises UserError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction: {fraction} is not in [0, 1); try 0.05")
    held_out = np.zeros(len(size_of_document), dtype=bool)
    if fraction == 0:
        return Split(held_out)
    if len(size_of_document) == 1:
        return Split(held_out, cut=round(int(size_of_document[0]) * (1 - fraction)))
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    room = fraction * int(size_of_document.sum())
    order = generator.permutation(len(size_of_document))
    taken = 0
    for first in range(0, len(order), AT_A_TIME):
        some = order[first : first + AT_A_TIME]
        for index, size in zip(some.tolist(), size_of_document[some].tolist(), strict=True):
            if taken + size <= room:
                taken += size
                held_out[index] = True
    if not taken:
        held_out[int(np.argmin(size_of_document))] = True
    return Split(held_out)


def split_pieces(pieces: Iterator[Piece], split: Split) -> Iterator[tuple[Piece, bool]]:
    """The pieces of a domain's documents, each with whether it is held out."""
    if split.cut is not None:
        yield from _cut(pieces, split.cut)
        return
    document = -1
    for piece in pieces:
        document += piece.begins
        yield piece, bool(split.held_out[document])


def _cut(pieces: Iterator[Piece], cut: int) -> Iterator[tuple[Piece, bool]]:
    begin, held_out = 0, False
    for piece in pieces:
        end = begin + piece.size
        if held_out or end < cut or len(piece.content) < 2:
            yield piece, held_out
        else:
            place = _place(piece.content, cut - begin)
            yield Piece(piece.content[:place], piece.begins), False
            yield Piece(piece.content[place:], True), True
            held_out = True
        begin = end


def _place(content: str | IntArray, aim: int) -> int:
    """Where to cut within a piece of two characters or more, of which both sides get some."""
    if not isinstance(content, str):
        return min(max(aim, 1), len(content) - 1)
    # Whole characters in the training share of the bytes.
    aim = len(content.encode()[:aim].decode(errors="ignore"))
    aim = min(max(aim, 1), len(content) - 1)
    # No line end may take more than half of either part away: better to cut inside a line then.
    reach = min(aim, len(content) - aim) // 2
    for boundary in ("\n", " "):
        before = content.rfind(boundary, aim - reach, aim) + 1
        after = content.find(boundary, aim, aim + reach) + 1
        ends = [end for end in (before, after) if end]
        if ends:
            return min(ends, key=lambda end: abs(end - aim))
    return aim
