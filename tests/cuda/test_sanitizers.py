"""The whole table, and mistakes planted, under g++'s sanitizers. Emulated, not run on a GPU.

The address sanitizer sees what lies outside an array, in shared memory too; that of undefined behaviour
integers that overflow, and vectors at addresses that the hardware refuses; the thread sanitizer two
threads, of one block or of two, that touch a number without a barrier between them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.cuda.backend import emulated_only

pytestmark = emulated_only
ROOT = Path(__file__).parents[2]
ADDRESS = "address,undefined"
THREAD = "thread"
FLAGS = {
    ADDRESS: f"-fsanitize={ADDRESS} -fsanitize-sections=shared_memory -fno-sanitize-recover=all -O1",
    THREAD: f"-fsanitize={THREAD} -O1",
}
LIBRARIES = {ADDRESS: ("libasan.so", "libubsan.so"), THREAD: ("libtsan.so",)}
# Python frees little at its end, and fibers' stacks are none that the sanitizer knows.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}
# Kernels of sums.cu with a mistake, run on a few numbers.
PLANTED = """
import sys
import numpy as np
from mhmoe_np.operations.cuda.sources import options_of, source_of
from tests.cuda.emulator import cupy_on_cpu as cupy

def on_device(array):
    copy = cupy.empty(array.shape, array.dtype)
    copy.set(array)
    return copy

old, new = sys.argv[1:]
code = source_of("sums")
assert old in code
module = cupy.RawModule(code=code.replace(old, new), options=options_of("float32"))
N = 600
x, onto = (on_device(np.ones(N, np.float32)) for _ in range(2))
total = on_device(np.zeros(1))
module.get_function("add_sum")((1,), (256,), (x, np.int64(N), total))
module.get_function("add_in_place")((3,), (256,), (x, np.int64(N), onto))
"""


@cache
def libraries(sanitizer: str) -> list[str]:
    """Where g++ has the sanitizer's."""
    paths = []
    for name in LIBRARIES[sanitizer]:
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"g++ has no {name}")
        paths.append(str(Path(found).resolve()))
    return paths


def under(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on these arguments; kernels, and what they are called from, are watched."""
    environment = {
        **os.environ,
        **OPTIONS,
        "CUDA_ON_CPU_FLAGS": FLAGS[sanitizer],
        "CUDA_ON_CPU_WITHOUT": r"_(64|128|256)$",  # attention of wide heads: the same source again
        "LD_PRELOAD": " ".join(libraries(sanitizer)),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",  # each object of its own
        "PYTHONPATH": str(ROOT),
    }
    # The thread sanitizer wants memory where it expects it.
    fixed = ["setarch", "-R"] if sanitizer == THREAD else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_whole_table_is_clean(sanitizer: str) -> None:
    done = under(sanitizer, "-m", "tests.cuda.under_sanitizer")
    assert "Sanitizer" not in done.stderr, done.stderr[:4000]
    assert "runtime error" not in done.stderr, done.stderr[:4000]
    assert done.returncode == 0, done.stderr[-4000:]


OUTSIDE = "heap-buffer-overflow"
RACE = "data race"
MISTAKES = {
    "one number too many": (ADDRESS, "if (p < P) onto_P", "if (p <= P) onto_P", OUTSIDE),
    "one warp too many": (
        ADDRESS,
        "room[thread / WARP] = x",
        "room[thread / WARP + 1] = x",
        "overflow|space",
    ),
    "a vector at any address": (
        ADDRESS,
        "sum += x_N[n];",
        "sum += ((const float2*)(x_N + 1))->x;",
        "misaligned address",
    ),
    "an index that overflows": (
        ADDRESS,
        "sum += x_N[n];",
        "sum += (int)n * 40000000;",
        "signed integer overflow",
    ),
    "no barrier before reading": (THREAD, "= x;\n  __syncthreads();", "= x;", RACE),
    "no barrier before writing anew": (
        THREAD,
        "  __syncthreads();\n  return sum;",
        "  if (thread % WARP == 0) room[thread / WARP] = sum;\n  return sum;",
        RACE,
    ),
    "two threads of a block at one number": (THREAD, "onto_P[p] +=", "onto_P[p & ~1] +=", RACE),
    "two blocks at one number": (THREAD, "onto_P[p] +=", "onto_P[p % THREADS] +=", RACE),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_reported(mistake: str) -> None:
    sanitizer, old, new, report = MISTAKES[mistake]
    done = under(sanitizer, "-c", PLANTED, old, new)
    assert done.returncode, done.stderr
    assert any(word in done.stderr for word in report.split("|")), done.stderr[:4000]


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_kernels_themselves_are_clean(sanitizer: str) -> None:
    done = under(sanitizer, "-c", PLANTED, "THREADS", "THREADS")
    assert (done.returncode, done.stderr) == (0, "")
