"""The wheel, installed where nothing of the clone is: what `pip install mhmoe-np` gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
[model]
vocab_size = 300
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 16
max_position_embeddings = 64
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 8
moe_heads = 2

[training]
batch_size = 2
sequence_length = 16
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for the build leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("cli", "mhmoe_np"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", "made", "."], cwd=folder, check=True)
    (made,) = (folder / "made").iterdir()
    return made


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "mhmoe_np", "cli"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == {name.replace("cli/", "mhmoe_cli/") for name in tracked}


def test_it_trains_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # What the package depends on is that of this environment; a package that is installed in it as a
    # link to its clone is not found this way.
    (home / "lib" / version / "site-packages" / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("the whale and the sea\n" * 300)

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import mhmoe_cli, mhmoe_np; print(mhmoe_cli.__file__, mhmoe_np.__file__)"
    assert all(path.startswith(str(home)) for path in run(python, "-c", code).split())
    options = ("--data", "text.txt", "--steps", "2", "--backend", "numpy", "--out", "run")
    assert "sample:" in run(home / "bin" / "mhmoe-np", "train", "config.toml", *options)
