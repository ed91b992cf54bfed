"""How a bar looks, in a terminal of any width: the stage's name, how far it is, how long it will take.

Where room is short the bar itself gives way, then the speed, and the name last.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn
from rich.table import Column
from rich.text import Text

from mhmoe_cli.printing import duration, printable

WIDE = 80  # columns from which on a speed is shown beside the time
BESIDE = len("* ") + len(" 100% ")  # the columns beside a stage's name and its time


class Bar(Progress):
    """A bar on standard error.

    Attributes:
        note: lines that stand beneath it.
    """

    def __init__(self, unit: str = "", *, transient: bool = True) -> None:
        """Make a bar that is not drawn yet.

        unit: what is counted; bytes are shown with their speed.
        transient: whether nothing is left of it when it ends.
        """
        self.note = ""
        screen = Console(stderr=True)
        dots = "dots" if screen.encoding.startswith("utf") else "line"
        super().__init__(
            _Turning(dots) if transient else SpinnerColumn(dots, finished_text=" "),
            _Stage(screen, unit),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            _Time(screen, unit),
            console=screen,
            expand=True,
            transient=transient,
            redirect_stdout=False,  # the library would print it on standard error
        )

    def show(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is; another one's bar begins anew. total: 0: nobody knows."""
        stage = printable(stage)
        if not self.tasks or self.tasks[0].description != stage:
            for task in self.tasks:
                self.remove_task(task.id)
            self.add_task(stage, total=None, completed=done)
        self.update(self.tasks[0].id, completed=done, total=total or None)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the note beneath it."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)


class _Turning(SpinnerColumn):
    """A spinner that turns at a stage's end too: what comes after it may take a while."""

    def render(self, task: Task) -> RenderableType:
        return self.spinner.render(task.get_time())


class _Time(ProgressColumn):
    """How long it will take, or has taken where that is not known yet; of bytes their speed."""

    def __init__(self, screen: Console, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._screen, self._unit = screen, unit

    def render(self, task: Task) -> Text:
        return Text(_time(task, self._screen, self._unit))


class _Stage(ProgressColumn):
    """The stage's name, cut only where it has no room even without the bar."""

    def __init__(self, screen: Console, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._screen, self._unit = screen, unit

    def render(self, task: Task) -> Text:
        beside = BESIDE + len(_time(task, self._screen, self._unit)) + len(" ")
        name = Text(task.description)
        name.truncate(max(1, self._screen.width - beside), overflow="ellipsis")
        return name


def _time(task: Task, screen: Console, unit: str) -> str:
    left = task.time_remaining
    if left is None or not task.speed:
        return f"{duration(task.elapsed or 0.0)} so far"
    speed = f"{task.speed / 1e6:.1f} MB/s, " if unit == "bytes" and screen.width >= WIDE else ""
    return f"{speed}{duration(left)} left"
