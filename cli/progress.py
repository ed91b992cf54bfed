"""Signs of life of a long step: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click

from mhmoe_cli.printing import duration, printable
from mhmoe_np.progress import OnProgress

if TYPE_CHECKING:
    from mhmoe_cli.bars import Bar

SECONDS_BEFORE_A_BAR = 0.3
SECONDS_BETWEEN_LINES = 10.0
_live: list[Bar] = []  # the bar that is on the terminal, or about to be, if there is one
_line_is_open = False  # standard output stands within a line


def print_part(text: str) -> None:
    """Print a part of a text, which may end within a line, on standard output."""
    global _line_is_open
    click.echo(text, nl=False, color=True)  # else click takes escape sequences out
    if text:
        _line_is_open = not text.endswith("\n")


def tell(line: str) -> None:
    """Say something on standard error, above the bar if there is one, and not in a line of text.

    Only a reader that went away ends the command; one that writes to a full disk does not.
    """
    global _line_is_open
    try:
        if _live and _live[-1].live.is_started:
            _live[-1].console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            is_within_text = _line_is_open and sys.stdout.isatty() and sys.stderr.isatty()
            click.echo("\n" * is_within_text + line, err=True)
            _line_is_open = _line_is_open and not is_within_text
    except BrokenPipeError:
        raise
    except OSError:
        pass


def may_show_bar() -> bool:
    """Whether standard error is a terminal that can be drawn on, and has no bar yet."""
    can_draw = os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    return not _live and can_draw and sys.stderr.isatty()


@contextmanager
def shown(bar: Bar, *, after: float = 0.0) -> Iterator[None]:
    """Keep a bar on the terminal; what `tell` says meanwhile goes above it.

    after: seconds before it is drawn. Work that ends sooner draws nothing, which would only flicker.
    """
    lock, ended = threading.Lock(), False

    def draw() -> None:
        with lock, contextlib.suppress(OSError):  # the terminal is gone
            if not ended:
                bar.start()

    timer = threading.Timer(after, draw)
    timer.daemon = True
    _live.append(bar)
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
        _live.remove(bar)
        with contextlib.suppress(OSError):
            if bar.live.is_started:
                bar.stop()


@contextmanager
def progress(unit: str = "") -> Iterator[OnProgress]:
    """Show how far some work is: what is given is called with its stage, what is done, and of how much.

    unit: what is counted, in the plural; bytes are shown with their speed. The bar comes when the work
    takes a moment and goes away when it ends. Beneath another bar, and where there is no terminal, work
    that takes long is told in lines instead, also while nothing calls.
    """
    with _bar(unit) if may_show_bar() else _lines(unit) as show:
        yield show


@contextmanager
def _bar(unit: str) -> Iterator[OnProgress]:
    from mhmoe_cli.bars import Bar

    bar = Bar(unit)
    with shown(bar, after=SECONDS_BEFORE_A_BAR):
        yield bar.show


class _State(NamedTuple):
    """How far a stage is."""

    stage: str
    done: int
    total: int
    started: float

    def line(self, unit: str, now: float) -> str:
        """It as a line, at the time `now`."""
        seconds = now - self.started
        if not (self.done and self.total):
            return f"{self.stage}: {duration(seconds)} so far"
        left = f"{duration(seconds * (self.total - self.done) / self.done)} left"
        if unit == "bytes":
            speed = f"{self.done / 1e6 / seconds:.1f} MB/s"
            counted = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
            return f"{self.stage}: {counted}, {speed}, {left}"
        counted = f"{self.done:,} of {self.total:,} {unit}".rstrip()
        return f"{self.stage}: {counted}, {self.done / self.total:.0%}, {left}"


@contextmanager
def _lines(unit: str) -> Iterator[OnProgress]:
    state: _State | None = None
    ended = threading.Event()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal state
        stage = printable(stage)
        before = state
        started = before.started if before and before.stage == stage else time.monotonic()
        state = _State(stage, done, total, started)

    def speak() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            if state is not None:
                with contextlib.suppress(OSError):  # nobody reads; the command itself finds out
                    tell(state.line(unit, time.monotonic()))

    thread = threading.Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()
