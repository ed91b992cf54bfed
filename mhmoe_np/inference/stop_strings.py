"""Ending a text before a string, also one that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from mhmoe_np.errors import UserError


class StopStrings:
    """Lets pieces of a text through up to the first of some strings that is complete.

    What may be the beginning of one is held back until it is known. Where two become complete with the
    same character, the text ends before the longer one. How the text is cut into pieces makes no
    difference.

    Attributes:
        found: whether one was found; then nothing more comes.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Watch for these strings.

        Raises UserError: one is empty.
        """
        if "" in strings:
            raise UserError("stop: an empty string ends every text; give at least one character")
        self.found = False
        self._strings, self._held = tuple(strings), ""

    def through(self, piece: str) -> str:
        """What can be shown once this piece has come."""
        self._held += piece
        found = [
            (start + len(string), start)
            for string in self._strings
            if (start := self._held.find(string)) >= 0
        ]
        if found:
            self.found = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        kept = max((self._begun(string) for string in self._strings), default=0)
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> str:
        """What was held back when the text ended otherwise."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self, string: str) -> int:
        """How many characters of the string the held text ends with."""
        most = min(len(string) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(string[:n])), 0)
