"""What a long step shows: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from mhmoe_cli import progress as shown
from mhmoe_cli.progress import duration, progress, tell


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_a_line_is_told_now_and_then(
    clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("scoring [red]a\n", "tokens") as show:
        for done, second in ((0, 11.0), (1000, 11.0), (2000, 20.9), (4000, 21.0), (10_000, 22.0)):
            clock[0] = 100.0 + second
            show(done, 10_000)
    printed, said = capsys.readouterr()
    assert printed == ""
    # 1,000 took 11 s, so 9,000 take 99 s; 4,000 took 21 s, so 6,000 take 31.5 s.
    assert said.splitlines() == [
        "scoring [red]a\\n: 1,000 of 10,000 tokens, 10%, 99 s left",
        "scoring [red]a\\n: 4,000 of 10,000 tokens, 40%, 32 s left",
    ]


def test_a_short_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing") as show:
        show(1, 1)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(code: str, columns: int) -> str:
    """What the code writes to a terminal of so many columns."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    told = ("COLUMNS", "LINES", "NO_COLOR", "TERM")
    environment = {key: value for key, value in os.environ.items() if key not in told}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=environment | {"TERM": "xterm"},
    )
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 4096):
            written += piece
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def test_on_a_terminal_a_bar_fills_its_width_and_what_is_told_stands_above_it() -> None:
    written = on_a_terminal(
        "import time; from mhmoe_cli.progress import progress, tell\n"
        "with progress('packing [red]', 'matrices') as show:\n"
        "    show(1, 4); time.sleep(0.3)\n"
        "    tell('compiling [red] kernels, in a line longer than the terminal is wide ...')\n"
        "    with progress('inside') as inner: inner(1, 2)\n"
        "    show(4, 4)\n",
        60,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    bars = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("packing [red] ")]
    assert any("25%" in line for line in bars)
    assert max(len(line) for line in bars) == 60
    # The bar's line is cleared first, and the line comes whole, as the terminal will fold it.
    told = "compiling [red] kernels, in a line longer than the terminal is wide ..."
    assert f"\r\x1b[2K{told}\r\n" in written
    assert "inside" not in plain
    assert written.endswith("\x1b[1A\x1b[2K")  # it leaves nothing


def test_with_no_bar_a_line_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell("[red]plain")
    assert capsys.readouterr() == ("", "[red]plain\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (58, "58 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7140, "119 min"),
        (11_100, "3 h 5 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said
