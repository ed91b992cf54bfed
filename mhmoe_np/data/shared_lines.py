"""How much of the held-out text stands in the training text as well, line by line."""

from __future__ import annotations

from collections import Counter

import xxhash

MOST_LINES = 200_000  # that are remembered, some 100 bytes each


class SharedLines:
    """Counts held-out lines that the training text has too: first give it all held-out text.

    Lines are compared by their hashes, without white space around them; blank ones do not count. Of
    more lines than are remembered every second one is dropped, by its hash, and the result is scaled:
    an estimate then.
    """

    def __init__(self) -> None:
        """Start with no text."""
        self.lines = 0  # held out, none blank
        self._mask = 0
        self._times: Counter[int] = Counter()
        self._found: set[int] = set()

    def add_held_out(self, text: str) -> None:
        """Remember the lines of some held-out text."""
        hashes = _hashes(text)
        self.lines += len(hashes)
        self._times.update(number for number in hashes if not number & self._mask)
        while len(self._times) > MOST_LINES:
            self._mask = 2 * self._mask + 1
            for number in [number for number in self._times if number & self._mask]:
                del self._times[number]

    def add_training(self, text: str) -> None:
        """Look for the remembered lines in some training text."""
        self._found |= self._times.keys() & set(_hashes(text))

    @property
    def shared(self) -> int:
        """Held-out lines that the training text has too."""
        return (self._mask + 1) * sum(self._times[number] for number in self._found)

    @property
    def is_estimate(self) -> bool:
        """Whether not all lines were remembered."""
        return self._mask > 0


def _hashes(text: str) -> list[int]:
    lines = filter(None, map(str.strip, text.split("\n")))
    return list(map(xxhash.xxh3_64_intdigest, map(str.encode, lines)))
