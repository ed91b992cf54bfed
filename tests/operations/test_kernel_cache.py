"""Kernels are compiled from the sources as they are now, and no more often than these change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BACKEND = Path("mhmoe_np/operations/numba_cpu")

# A norm, whose file calls another one's sums; a product with weights whose codes are all 1, which is 0.
COMPUTE = """
import json, sys
import numpy as np
from numba.core import event
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu.kernel_cache import FOLDER
from mhmoe_np.operations.packing import PackedMatrices, empty_code
from mhmoe_np.operations.table import PackedWeight

ops = load_operations("numba")
x, w = np.full((1, 16), 2, np.float32), np.ones(16, np.float32)
code = empty_code(1, 16, 16, "ternary-2bit")
code[...] = 0b01010101
weight = PackedWeight(PackedMatrices(code, 16, 16, "ternary-2bit"), np.ones((1, 16), np.float32))
with event.install_recorder("numba:compile") as compiled:
    rstd = float(ops.rms_norm(x, w, eps=1e-5)[1][0])
    product = float(ops.linear(x, weight, None)[0, 0])
result = {"rstd": rstd, "product": product, "compiled": len(compiled.buffer), "folder": str(FOLDER)}
result["compiler"] = "numba.cpython.setobj" in sys.modules  # of what is registered to compile with
print(json.dumps(result))
"""


def run(code: str, root: Path, **variables: str) -> str:
    # Products of our own, which nobody asks for here, would be compiled anew each time.
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["MHMOE_NP_BLAS"] = "openblas"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)} | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def compute(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(COMPUTE, root))
    return result


def edit(path: Path, old: str, new: str) -> None:
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the package that nothing was compiled for."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mhmoe_np", tmp_path / "mhmoe_np", ignore=ignored)
    return tmp_path


def test_an_edited_source_is_used_at_once_and_an_unedited_one_compiled_once(root: Path) -> None:
    first = compute(root)
    assert first["rstd"] == pytest.approx(0.5, rel=1e-5)
    assert first["product"] == 0
    assert first["compiled"] > 0
    assert Path(first["folder"]).parent == root / BACKEND / "__pycache__"
    assert first["compiler"]
    kept = first | {"compiled": 0, "compiler": False}
    assert compute(root) == kept

    arithmetic, packing = root / BACKEND / "arithmetic.py", root / BACKEND.parent / "packing.py"
    edit(arithmetic, "total += x_S[j] * y_S[j]", "total += 4 * x_S[j] * y_S[j]")
    assert compute(root)["rstd"] == pytest.approx(0.25, rel=1e-5)
    edit(arithmetic, "total += 4 * x_S[j] * y_S[j]", "total += x_S[j] * y_S[j]")
    assert compute(root) == kept  # what was compiled before is still there

    edit(packing, "depth=4, base=3, lowest=-1", "depth=4, base=3, lowest=0")
    assert compute(root)["product"] == pytest.approx(32, rel=1e-2)


def test_files_that_a_power_failure_cut_short_are_compiled_anew(root: Path) -> None:
    first = compute(root)
    indices = sorted(Path(first["folder"]).glob("*/*.nbi"))
    code = sorted(Path(first["folder"]).glob("*/*.nbc"))
    assert min(len(indices), len(code)) > 2
    for number, path in enumerate(indices):
        os.truncate(path, [0, 20, path.stat().st_size][number % 3])
    for number, path in enumerate(code):
        os.truncate(path, [path.stat().st_size, 0, 100][number % 3])
    again = compute(root)
    assert again == first | {"compiled": again["compiled"]}
    assert again["compiled"] > 0
    assert compute(root) == first | {"compiled": 0, "compiler": False}


def test_a_folder_that_nobody_used_for_a_month_goes_when_another_is_made(
    root: Path, tmp_path: Path
) -> None:
    chosen = tmp_path / "chosen"
    old, recent = chosen / "mhmoe-np-kernels-old", chosen / "mhmoe-np-kernels-recent"
    foreign = chosen / "something-else"
    for folder in (old, recent, foreign):
        folder.mkdir(parents=True)
    for folder in (old, foreign):
        os.utime(folder, (time.time() - 31 * 24 * 3600,) * 2)
    code = "from mhmoe_np.operations.numba_cpu.kernel_cache import FOLDER; print(FOLDER)"
    made = Path(run(code, root, NUMBA_CACHE_DIR=str(chosen)).strip())
    assert set(chosen.iterdir()) == {recent, foreign, made}
