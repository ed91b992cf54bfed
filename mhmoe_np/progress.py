"""How a long step says how far it is: to whoever called it, who decides what to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much; 0: nobody knows of how much."""


def counting(on_progress: OnProgress, stage: str, total: int) -> Callable[[int], None]:
    """What adds up how much of a stage is done and tells it, each time that there is more."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    return add


def unseen(stage: str, done: int, total: int) -> None:
    """The progress of a step that nobody watches."""
