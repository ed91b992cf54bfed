"""Ids that were found before, by the piece of text that they stand for."""

from __future__ import annotations

MOST_CHARACTERS = 8_000_000  # in all pieces that are remembered


class KnownIds(dict[str, bytes]):
    """Ids by piece; add with `learn`, and now and then `make_room`."""

    def __init__(self, most: int) -> None:
        """most: pieces that are remembered, some 200 bytes each."""
        super().__init__()
        self._most, self._characters = most, 0

    def learn(self, piece: str, ids: bytes) -> None:
        """Remember the ids of a piece."""
        self[piece] = ids
        self._characters += len(piece)

    def make_room(self) -> None:
        """Forget all, where that is too much."""
        if len(self) > self._most or self._characters > MOST_CHARACTERS:
            self.clear()
            self._characters = 0
