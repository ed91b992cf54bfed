"""How a long step says how far it is: to whoever called it, who decides what to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many units are done, and of how many, after each piece of a long step."""


def unseen(done: int, of: int) -> None:
    """The progress of a step that nobody watches."""
