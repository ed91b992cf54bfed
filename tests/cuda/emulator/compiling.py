"""Kernels compiled for the CPU by g++, once for all processes: kept in the temporary folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).with_name("cuda_on_cpu.hpp")
RUNTIME = Path(__file__).with_name("cuda_on_cpu.cpp")
COMPILER = [
    *("g++", "-O2", "-g1", "-march=native", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-maybe-uninitialized"),
]
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+'
    r"(?:__launch_bounds__\((?P<bounds>(?:[^()]|\([^()]*\))*)\)\s*)?(?P<name>\w+)\s*\("
)
MOST_THREADS = "1024"


def extra_flags() -> list[str]:
    """What the environment adds, such as a sanitizer."""
    return os.environ.get("CUDA_ON_CPU_FLAGS", "").split()


def compiled(code: str, options: tuple[str, ...]) -> Path:
    """The library of a module's kernels, without those whose names the environment leaves out."""
    left_out = re.compile(os.environ.get("CUDA_ON_CPU_WITHOUT", "$^"))
    doors = "".join(
        f"EMULATED({kernel['name']}, {kernel['bounds'] or MOST_THREADS})\n"
        for kernel in KERNEL.finditer(code)
        if not left_out.search(kernel["name"])
    )
    unit = f'#include "{HEADER}"\n#line 1 "kernel.cu"\n{code}\n{doors}'
    defined = [option for option in options if option.startswith("-D")]
    command = [*COMPILER, *extra_flags(), "-std=c++17", *defined, "-shared", "-x", "c++", "-"]
    return library_of(
        unit, [*command, "-x", "none", str(_runtime())], HEADER.read_text(encoding="utf-8")
    )


def _runtime() -> Path:
    """The compiled form of what all kernels need."""
    flags = extra_flags()
    if "-fsanitize=thread" in flags:
        flags = [flag for flag in flags if flag != "-fsanitize=thread"] + ["-DWATCHES_RACES"]
    command = [*COMPILER, *flags, "-std=c++20", "-c", "-x", "c++", "-I", str(HEADER.parent), "-"]
    return library_of(
        RUNTIME.read_text(encoding="utf-8"), command, HEADER.read_text(encoding="utf-8"), ".o"
    )


def library_of(unit: str, command: list[str], also: str = "", ending: str = ".so") -> Path:
    """Compile C++; `also` is what else the result depends on.

    Raises RuntimeError: it does not compile; with what the compiler says.
    """
    key = hashlib.sha256("\0".join([unit, also, *command]).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}{ending}"
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(".part")
            done = subprocess.run(
                [*command, "-o", str(part)], input=unit, check=False, text=True, stderr=subprocess.PIPE
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            part.replace(library)
    return library
