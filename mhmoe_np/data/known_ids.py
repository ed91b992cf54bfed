"""Ids that were found before, by the piece of text that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MOST_CHARACTERS = 8_000_000  # in all pieces that are remembered

Encode = Callable[[list[str]], Sequence[bytes]]


class KnownIds:
    """Encodes each different piece once, as long as it is remembered."""

    def __init__(self, encode: Encode, *, most: int) -> None:
        """encode: the ids of pieces; most: pieces that are remembered, some 200 bytes each."""
        self._encode, self._most = encode, most
        self._ids_of_piece: dict[str, bytes] = {}
        self._characters = 0

    def joined(self, texts: Sequence[Sequence[str]]) -> list[bytes]:
        """The ids of each text, which is given in pieces.

        Raises whatever `encode` does.
        """
        known = self._ids_of_piece
        if len(known) > self._most or self._characters > MOST_CHARACTERS:
            known.clear()
            self._characters = 0
        found: list[list[Any]] = [list(map(known.get, pieces)) for pieces in texts]
        places = [[i for i, ids in enumerate(each) if ids is None] for each in found]
        # In order, and each once.
        new = list({pieces[i]: None for pieces, at in zip(texts, places, strict=True) for i in at})
        known.update(zip(new, self._encode(new) if new else (), strict=True))
        self._characters += sum(map(len, new))
        for each, pieces, at in zip(found, texts, places, strict=True):
            for i in at:
                each[i] = known[pieces[i]]
        return [b"".join(each) for each in found]
