"""Telling the user that kernels are being compiled: the first run on a machine waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import event


class _FirstCompilation(event.Listener):
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell: Callable[[], None] | None = tell

    def on_start(self, _event: Any) -> None:
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell()

    def on_end(self, _event: Any) -> None:
        pass


def on_first_compilation(tell: Callable[[], None]) -> None:
    """Call `tell` once, when the first kernel is compiled rather than read from the cache."""
    event.register("numba:compile", _FirstCompilation(tell))  # type: ignore[no-untyped-call]
