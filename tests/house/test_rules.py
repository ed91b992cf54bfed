"""The rules of the house, as tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_wheel_lists_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mhmoe_np").rglob("__init__.py")
    }
    assert listed == found | {"mhmoe_cli"}


def test_help_imports_neither_numpy_nor_numba() -> None:
    code = (
        "import atexit, sys; sys.argv = ['mhmoe-np', '--help']\n"
        "atexit.register(lambda: print([m for m in ('numpy', 'numba') if m in sys.modules]))\n"
        "from mhmoe_cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")


def test_the_readme_runs_only_commands_that_exist() -> None:
    from mhmoe_cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text()
    used = set(re.findall(r"mhmoe-np (\w+)", readme))
    assert set(COMMANDS) <= used
    assert used <= set(COMMANDS)


def test_the_readmes_map_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "mhmoe_np").glob("*/__init__.py")}
    named = set(re.findall(r"^  ([a-z]+)/ ", readme, re.MULTILINE))
    assert named == rooms


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|toml|sh))`", (ROOT / page).read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "mhmoe_np" / name).exists(), name
