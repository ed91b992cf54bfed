"""How far a long work is: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

import click

SECONDS_BETWEEN_LINES = 10.0
FIRST_LINE_AFTER = 2.0  # seconds: what is done by then needs no line


class ByteProgress:
    """Shows stages of work over bytes on standard error; its `show` is told how far each is.

    A stage that is over within two seconds leaves no line where there is no terminal.
    """

    def __init__(self) -> None:
        """Nothing is shown before the first stage."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
                expand=True,
                transient=True,
            )
        self._stage = ""
        self._started = self._told = 0.0

    def __enter__(self) -> ByteProgress:
        """Begin to show."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing on the terminal."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a stage are done; total 0: nobody knows how many."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started = stage, now
            self._told = now - SECONDS_BETWEEN_LINES + FIRST_LINE_AFTER
            if self._bar is not None:
                for task in self._bar.tasks:
                    self._bar.remove_task(task.id)
                self._task = self._bar.add_task(stage, total=total or None)
            elif not total:
                self._tell(f"{stage} ...")
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif done and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            rate = done / (now - self._started)
            self._tell(
                f"{stage}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {rate / 1e6:.1f} MB/s  "
                f"{(total - done) / rate:,.0f} s left"
            )

    def _tell(self, line: str) -> None:
        # A full disk behind standard error is no reason to stop.
        with contextlib.suppress(OSError):
            click.echo(line, err=True)
