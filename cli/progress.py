"""Signs of life of a long step: a bar with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mhmoe_cli.printing import printable
from mhmoe_np.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0
_live: list[Bar] = []  # the bar that is on the terminal, if there is one


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
def shown(bar: Bar) -> Iterator[None]:
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
def progress(title: str, unit: str = "") -> Iterator[Progress]:
    """Show how far a step is: what is given is to be called with how many units of how many are done.

    title: what is being done, as "scoring speech"; unit: what is counted, in the plural. The bar goes
    away when the step ends. Beneath another bar, and where there is no terminal, a step that takes long
    is told in lines instead.
    """
    title = printable(title)
    if not may_show_bar():
        yield _lines(title, unit)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=bar_console(),
        expand=True,
        transient=True,
    )
    task = bar.add_task(title, total=None)
    with shown(bar):
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _lines(title: str, unit: str) -> Progress:
    started = told = time.monotonic()

    def line(done: int, of: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < SECONDS_BETWEEN_LINES or not done:
            return
        told = now
        left = (now - started) * (of - done) / done
        counted = f"{done:,} of {of:,} {unit}".rstrip()
        tell(f"{title}: {counted}, {done / of:.0%}, {duration(left)} left")

    return line


def duration(seconds: float) -> str:
    """Seconds as people say them: 58 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
