"""How far an evaluation has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mhmoe_cli.printing import printable, tell

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0


class ProgressLines:
    """Says how far something has come, and how long it still takes, but not often."""

    def __init__(self) -> None:
        self._doing = ""
        self._began = self._said = time.perf_counter()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """See the library's `OnProgress`."""
        now = time.perf_counter()
        if doing != self._doing:
            self._doing, self._began = doing, now
        if done < total and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._began) * (total - done) / max(done, 1)
            tell(f"{printable(doing)}: {100 * done // total}%, {left:.0f} s left")


class EvaluationProgress:
    """`with EvaluationProgress() as progress`, then call it as the library's `OnProgress`."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._lines = ProgressLines()
        self._bar: Progress | None = None
        if console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        self._task: TaskID | None = None
        self._doing = ""

    def __enter__(self) -> EvaluationProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Show what is being done, and how much of it is."""
        if self._bar is None:
            self._lines(doing, done, total)
            return
        if self._task is None or doing != self._doing:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._doing = self._bar.add_task(printable(doing)[:32], total=total), doing
        self._bar.update(self._task, completed=done)
