"""What only a real GPU can tell: `pytest -m gpu` runs it, beside all tests of the cuda backend.

Without a GPU these are skipped, and the others run emulated, without the mark.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit.agreement import agreement, results_of
from mhmoe_np.audit.calls import calls
from mhmoe_np.audit.gradcheck import check_all
from mhmoe_np.audit.models import KINDS, QUANTISED
from mhmoe_np.operations.load import load_operations
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import has_gpu
from tests.cuda.test_models import NUMPY, all_of, worst
from tests.gpu import small_work

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
WORK = [
    ("mh2-shared-sub-norm", "float32"),
    ("mh2-shared", "tf32x3"),
    ("mh3-ternary-shared-capacity", "tf32"),
]
SANITIZER_SECONDS = 150

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU and CuPy"),
]


def test_the_command_line_finds_the_gpu() -> None:
    device = load_operations("cuda").device()
    assert device is not None
    assert 0 < device.free_bytes <= device.total_bytes


# With rounding alone deciding nothing: quantised activations at a tie may go either way in float32.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUANTISED])
def test_every_kind_in_float32(kind: str) -> None:
    ops = cuda_operations(keep_buffers=True)
    actual, expected = all_of(kind, ops, np.float32), all_of(kind, NUMPY, np.float32)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert worst(actual[name], value) < 1e-4, name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_operation_beside_the_definition(dtype: str) -> None:
    """As `audit` compares them."""
    ops = cuda_operations()
    for call in calls(dtype, definition=NUMPY):
        found = agreement(call, results_of(call, ops), results_of(call, NUMPY), dtype=dtype)
        assert found.passed, found


def test_every_gradient() -> None:
    """Each operation's and each kind of model's, against central differences in float64."""
    assert [check.name for check in check_all(cuda_operations()) if not check.passed] == []


@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
@pytest.mark.parametrize(("kind", "matmul"), WORK)
def test_the_sanitizers_find_nothing(kind: str, matmul: str, tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    command += [sys.executable, "-m", small_work.__name__, kind, matmul]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards" in result.stdout


@pytest.mark.parametrize("matmul", ["tf32", "tf32x3"])
def test_a_step_is_the_same_every_time(matmul: str) -> None:
    found: list[dict[str, Any]] = [
        all_of("mh2-shared", cuda_operations(keep_buffers=True, matmul=cast(Any, matmul)), np.float32)
        for _ in range(3)
    ]
    for again in found[1:]:
        for name, value in found[0].items():
            assert np.asarray(again[name]).tobytes() == np.asarray(value).tobytes(), name
