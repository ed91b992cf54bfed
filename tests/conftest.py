"""Shared by all tests: the command line as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


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
