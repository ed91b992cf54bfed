"""Shared by all tests: the command line as a user runs it, and what a machine may lack.

On a machine with a GPU and little else `pytest -m gpu` runs: without pytest's plugins, and passing over
modules whose imports need a library that is not there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.libraries import ABSENT, is_there

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: Any) -> None:
    """The options that `pyproject.toml` gives to plugins, where these are not installed."""
    if not is_there("xdist"):
        group = parser.getgroup("xdist")
        group._addoption("-n", dest="numprocesses")  # `addoption` leaves lower-case letters to pytest
        group.addoption("--dist", dest="dist")
    if not is_there("pytest_timeout"):
        parser.addini("timeout", "seconds that a test may take; not watched here")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A module that imports a library that is absent is skipped, and the library named."""
    report: Any = yield
    if report.outcome == "failed":
        said = str(report.longrepr)
        missing = [
            name for name in sorted(ABSENT) if f"ModuleNotFoundError: No module named '{name}" in said
        ]
        if missing:
            reason = f"Skipped: {missing[0]} is not installed"
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


@pytest.fixture
def mhmoe(tmp_path: Path) -> Run:
    """Run `mhmoe-np` in a folder of its own; `code` is the exit code it must have."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from mhmoe_cli.main import main; main()"]
        result = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr + result.stdout
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def mhmoe_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The same in this process, which has imported and compiled most already: many times as fast."""
    # Not above: from its source tree alone, as on a machine with a GPU, the package is under no name.
    from mhmoe_cli.main import main

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mhmoe-np", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, said = capsys.readouterr()
        assert ended.value.code == code, said + printed
        return subprocess.CompletedProcess(sys.argv, code, printed, said)

    return run
