"""The emulated kernels under g++'s sanitizers: no access out of bounds, nothing undefined, no race.

Compiled and emulated, not run on a GPU.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.backend import emulated_only

pytestmark = emulated_only
ROOT = Path(__file__).parents[2]
FLAGS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
OPTIONS = {
    # Python never frees all; a fiber's stack is not the thread's.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1",
    "TSAN_OPTIONS": "report_signal_unsafe=0",
}
OF_THE_TABLE = "sums linear quantisers norm attention feed_forward router experts loss optimiser"
PLANTED = """
import numpy as np
from tests.cuda.emulator import cupy_on_cpu as cupy
code = '''extern "C" __global__ void __launch_bounds__(64) planted(float* x, int N) {
  __shared__ float room[64];
  room[threadIdx.x] = threadIdx.x;
  BARRIER
  if ((int)threadIdx.x < N) x[threadIdx.x] = room[63 - threadIdx.x];
}'''
kernel = cupy.RawModule(code=code.replace("BARRIER", BARRIER)).get_function("planted")
kernel((1,), (64,), (cupy.empty((50,), np.float32), np.int32(N)))
"""


def under(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with arguments, its kernels compiled for a sanitizer."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in LIBRARIES[sanitizer]
    ]
    environment = {
        **os.environ,
        **OPTIONS,
        "CUDA_ON_CPU_FLAGS": FLAGS[sanitizer],
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",  # each array of its own
        "PYTHONPATH": str(ROOT),
    }
    # Its shadow memory must lie where it wants it.
    fixed = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.parametrize(("sanitizer", "names"), [("address", OF_THE_TABLE), ("thread", "norm router")])
def test_the_operations_are_clean(sanitizer: str, names: str) -> None:
    done = under(sanitizer, "-m", "tests.cuda.under_sanitizer", *names.split())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-4000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == names.split()


@pytest.mark.parametrize(
    ("sanitizer", "rows", "barrier", "said"),
    [
        ("address", 51, "__syncthreads();", "heap-buffer-overflow"),  # one row too many
        ("thread", 50, "", "data race"),  # no barrier
    ],
)
def test_planted_mistakes_are_found(sanitizer: str, rows: int, barrier: str, said: str) -> None:
    sound = under(sanitizer, "-c", f"N, BARRIER = 50, '__syncthreads();'\n{PLANTED}")
    assert sound.returncode == 0, sound.stderr[-4000:]
    planted = under(sanitizer, "-c", f"N, BARRIER = {rows}, {barrier!r}\n{PLANTED}")
    assert planted.returncode != 0
    assert said in planted.stderr, planted.stderr[-4000:]
