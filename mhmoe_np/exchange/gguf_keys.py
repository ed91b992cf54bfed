"""The keys of a GGUF file's architecture, read strictly: what is not asked for is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import shown


class Keys:
    """The keys `{architecture}.*` of a file."""

    def __init__(self, values: dict[str, Any], architecture: str, path: Path) -> None:
        self._prefix, self._path = f"{architecture}.", path
        self._left = {
            key: value for key, value in values.items() if key.startswith(self._prefix)
        }  # those that nobody has asked for

    def integer(self, key: str, default: int | None = None) -> int:
        """The value of an integer.

        Raises UserError: it is none, or missing and without a default.
        """
        value = self._take(key, default)
        if type(value) is not int:  # a truth value is no integer
            raise UserError(f"{self._named(key)} must be an integer (got {shown(value)})")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of a float32, as the shortest decimal that is that float32: 1e-5, not 9.99...e-6.

        Raises UserError: it is none, or missing and without a default.
        """
        value = self._take(key, default)
        if type(value) is not float:
            raise UserError(f"{self._named(key)} must be a number (got {shown(value)})")
        return float(str(np.float32(value)))

    def must_be(self, key: str, *allowed: object) -> None:
        """Let a key be absent or have a value that changes nothing.

        Raises UserError: it has another one.
        """
        name = self._prefix + key
        value = self._left.pop(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{self._named(key)} is {shown(value)}; the model's maths here has "
                f"{' or '.join(map(shown, allowed))}"
            )

    def ignore(self, key: str) -> None:
        """Pass over a key that says nothing of the maths."""
        self._left.pop(self._prefix + key, None)

    def refuse_others(self) -> None:
        """Make sure that nothing was left out.

        Raises UserError: a key has not been asked for.
        """
        for name, value in self._left.items():
            raise UserError(
                f"{self._path}: key {name!r} ({shown(value)}) has no counterpart here, and without it "
                "the model may compute something else; take a model without it"
            )

    def _take(self, key: str, default: float | None) -> Any:
        name = self._prefix + key
        if name not in self._left and default is None:
            raise UserError(f"{self._path}: lacks key {name!r}; convert the model again")
        return self._left.pop(name, default)

    def _named(self, key: str) -> str:
        return f"{self._path}: key {self._prefix + key!r}"
