"""Signs of life of a long step: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
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
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
_live: list[Progress] = []  # the bar that is on the terminal, if there is one


def tell(line: str) -> None:
    """Say something on standard error, above the bar if there is one.

    Only a reader that went away ends the command; one that writes to a full disk does not.
    """
    try:
        if _live:
            _live[-1].console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def may_show_bar() -> bool:
    """Whether standard error is a terminal that has no bar yet."""
    return not _live and sys.stderr.isatty()


def bar_console() -> Console:
    """Standard error, as bars are drawn there."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def shown(bar: Progress) -> Iterator[None]:
    """Keep a bar on the terminal; what `tell` says meanwhile goes above it."""
    bar.start()
    _live.append(bar)
    try:
        yield
    finally:
        _live.remove(bar)
        with contextlib.suppress(OSError):  # the terminal is gone
            bar.stop()


@contextmanager
def progress(unit: str = "") -> Iterator[OnProgress]:
    """Show how far some work is: what is given is called with its stage, what is done, and of how much.

    unit: what is counted, in the plural; bytes are shown with their speed. The bar goes away when the
    work ends. Beneath another bar, and where there is no terminal, work that takes long is told in
    lines instead, also while nothing calls.
    """
    with _bar(unit) if may_show_bar() else _lines(unit) as show:
        yield show


@contextmanager
def _bar(unit: str) -> Iterator[OnProgress]:
    from rich import progress as columns
    from rich.table import Column
    from rich.text import Text

    class Pace(columns.ProgressColumn):
        """Bytes a second, and how long it will take, or has taken where that is not known yet."""

        def render(self, task: columns.Task) -> Text:
            left = task.time_remaining
            if left is None or not task.speed:
                return Text(f"{duration(task.elapsed or 0.0)} so far")
            speed = f"{task.speed / 1e6:.1f} MB/s, " if unit == "bytes" else ""
            return Text(f"{speed}{duration(left)} left")

    bar = columns.Progress(
        columns.SpinnerColumn(),
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(bar_width=None),
        columns.TaskProgressColumn(),
        Pace(table_column=Column(no_wrap=True)),
        console=bar_console(),
        expand=True,
        transient=True,
    )

    def show(stage: str, done: int, total: int) -> None:
        stage = printable(stage)
        if not bar.tasks or bar.tasks[0].description != stage:
            for task in bar.tasks:
                bar.remove_task(task.id)
            bar.add_task(stage, total=None)
        bar.update(bar.tasks[0].id, completed=done, total=total or None)

    with shown(bar):
        yield show


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
