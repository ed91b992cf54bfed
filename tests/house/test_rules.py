"""The rules of the house, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mhmoe_np.types import DIMENSIONS

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "mhmoe_np").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shape_suffix_uses_letters_of_the_key(path: Path) -> None:
    names = {
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name | ast.arg)
    }
    for name in names:
        suffix = name.rpartition("_")[2]
        if (
            name.isupper()
            or not re.fullmatch(r"[A-Z0-9]+", suffix)
            or "_" not in name
            or suffix.isdigit()
        ):
            continue
        assert set(suffix) <= {*DIMENSIONS, "1"}, f"{name}: not in types.DIMENSIONS"


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


def test_every_source_tag_has_an_entry() -> None:
    known = (ROOT / "mhmoe_np" / "REFERENCES.md").read_text() + "P1 P2 R1 HF"
    decisions = (ROOT / "mhmoe_np" / "DECISIONS.md").read_text()
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for tag in re.findall(r"\[(P[12]|R1|B[12]|HF|spec)[ \]]", text):
            assert tag in known, f"{path}: [{tag}]"
        for decision in re.findall(r"\[(D\d+)\]", text):
            assert f"## {decision}." in decisions, f"{path}: [{decision}]"


def test_the_readme_runs_only_commands_that_exist() -> None:
    from mhmoe_cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text()
    used = set(re.findall(r"mhmoe-np (\w+)", readme))
    assert set(COMMANDS) <= used
    assert used <= set(COMMANDS)
