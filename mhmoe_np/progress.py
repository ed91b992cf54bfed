"""How a long step says how far it is: to whoever called it, who decides what to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much; 0: nobody knows of how much."""


def unseen(stage: str, done: int, total: int) -> None:
    """The progress of a step that nobody watches."""
