"""Being told to stop: Ctrl-C, a kill, a closed terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from mhmoe_np.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def collected_signals(on_signal: Callable[[int], None] | None) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying, each announced by `on_signal` at once.

    The second one raises `Interrupted`, wherever the program stands. A signal that is ignored, as by
    nohup, stays ignored. Only the main thread can catch signals: from another one this raises
    ValueError.
    """
    received: list[int] = []

    def note(kind: int, _frame: FrameType | None) -> None:
        received.append(kind)
        if len(received) > 1:
            ignore_from_here(previous)
            raise Interrupted(kind)
        if on_signal is not None:
            on_signal(kind)

    previous = {}
    for kind in SIGNALS:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            previous[kind] = signal.signal(kind, note)
    try:
        yield received
    finally:
        if len(received) < 2:
            for kind, handler in previous.items():
                signal.signal(kind, handler)


def ignore_from_here(signals: Iterable[int]) -> None:
    """Let nothing hold up a program that is on its way out.

    By a handler that does nothing: Python complains aloud of a signal that came before it was ignored.
    """
    for kind in signals:
        signal.signal(kind, lambda *_: None)
