"""NVIDIA's compilers from PyPI, which need no GPU: what they make of the kernels.

`nvcc` of CUDA 13 gives machine code for all `ARCHITECTURES` of a type in one call; its resources and
instructions are read back from that. NVRTC of CUDA 12, the oldest that CuPy may use here, is called as
a library. Results are cached in the temporary folder.

    python -m tests.cuda.toolchain --write    the resources of all kernels into `resources.toml`
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_np.operations.cuda.sources import REALS, kernel_files, options_of, source_of
from tests.cuda.emulator.compiling import KERNEL

# By float type; a file takes up to ten seconds for each. Float64 is for checking: oldest and newest.
ARCHITECTURES = {"float32": (75, 80, 90, 100), "float64": (75, 100)}
# What makes a source another on another architecture: its instructions are read on each, else on one.
DEPENDS_ON_ARCHITECTURE = re.compile(r"__CUDA_ARCH__|\basm\b|__dp4a")
NVRTC12_ARCHITECTURES = {"float32": (90,), "float64": (90,)}
BUDGET = Path(__file__).with_name("resources.toml")
AT_ONCE = 2  # compilers; each takes a core and some hundred MB
# What CuPy adds to all options; and no warning of a constant that is for other kernels (177).
ADDED = ("-ftz=true", "-diag-suppress=177")
# As CuPy does: lambdas need it, nvcc does not.
ADDED_FOR_NVRTC = ("--device-as-default-execution-space",)
# What the system keeps of a block's shared memory, if it has any, from compute capability 9.0 on.
SYSTEM_SHARED_BYTES, SYSTEM_SHARED_FROM = 1024, 90

FLOAT_TYPES = r"\.(?:F16|BF16|F32|F64)"
# REDG, ATOMG and the like name the type. In shared memory floats are added in a loop around a
# compare-and-swap, which a sum in 64-bit integers is too: what stands before it tells.
FLOAT_ATOMIC = re.compile(rf"\b(?:RED|REDG|ATOM|ATOMG|ATOMS|REDS)\.[\w.]*{FLOAT_TYPES}")
SWAP = re.compile(r"\bATOM[SG]?\.[\w.]*CAST?\b")
FLOAT_SUM = re.compile(r"\b[FDH](?:ADD|ADD2|FMA|FMA2)\b")
BEFORE_SWAP = 4  # instructions


class Resources(NamedTuple):
    """What a kernel takes on one architecture."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int


class Compiled(NamedTuple):
    """One source for one float type; by architecture, then by kernel."""

    log: str  # of a compilation that failed; empty otherwise
    resources: dict[int, dict[str, Resources]]
    instructions: dict[int, dict[str, list[str]]]


# ---- programs and libraries of the wheels ----------------------------------------------------


@cache
def wheel_file(wheel: str, name: str) -> Path:
    """A file that an installed wheel brought.

    Raises RuntimeError: it is not installed.
    """
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise RuntimeError(f"{name}: pip install {wheel}, as in pyproject.toml")


def run(wheel: str, program: str, *arguments: str, folder: Path | None = None) -> tuple[int, str]:
    """A program of a wheel: its exit code, and what it says."""
    path = wheel_file(wheel, program)
    environment = {
        **os.environ,
        "PATH": f"{path.parent}:{os.environ['PATH']}",
    }  # it calls its neighbours
    done = subprocess.run(
        [str(path), *arguments],
        cwd=folder,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


# ---- nvcc ------------------------------------------------------------------------------------


def compile_with_nvcc(
    source: str, options: Sequence[str], architectures: Sequence[int], disassemble: Sequence[int]
) -> Compiled:
    """Compile for several architectures, read some's instructions; a spilled register is an error."""
    arguments = [
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
        *("-fatbin", *options, *ADDED, "-Xptxas", "--warn-on-spills", "-Werror", "all-warnings"),
    ]
    versions = [metadata.version(wheel) for wheel in ("nvidia-cuda-nvcc", "nvidia-cuda-cuobjdump")]
    key = [source, *arguments, *map(str, disassemble), *versions]
    log, listing, assembly = _kept(key, lambda: _run_nvcc(source, arguments, disassemble))
    return Compiled(log, _resources(listing), _instructions(assembly))


def _kept(key: list[str], make: Callable[[], list[str]]) -> list[str]:
    """What was made for this key before, by any process, or is made now."""
    folder = Path(tempfile.gettempdir()) / f"cuda-toolchain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:20]}.json"
    if not kept.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:
            json.dump(make(), part)
        os.replace(part.name, kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def _run_nvcc(source: str, arguments: list[str], disassemble: Sequence[int]) -> list[str]:
    """What the compiler says, the resources and the instructions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernels.cu").write_text(source, encoding="utf-8")
        binary = ("-o", "kernels.fatbin", "kernels.cu")
        code, log = run("nvidia-cuda-nvcc", "nvcc", *arguments, *binary, folder=folder)
        if code:
            return [log or f"nvcc ended with {code}", "", ""]

        def dump(*what: str) -> str:
            code, text = run(
                "nvidia-cuda-cuobjdump", "cuobjdump", *what, "kernels.fatbin", folder=folder
            )
            assert code == 0, text
            return text

        assembly = [dump("-sass", "-arch", f"sm_{architecture}") for architecture in disassemble]
        return ["", dump("--dump-resource-usage"), "\n".join(assembly)]


def _by_architecture(text: str) -> dict[int, str]:
    parts = re.split(r"^arch = sm_(\d+)$", text, flags=re.M)
    return {int(arch): part for arch, part in zip(parts[1::2], parts[2::2], strict=True)}


def _resources(listing: str) -> dict[int, dict[str, Resources]]:
    line = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    found: dict[int, dict[str, Resources]] = {}
    for arch, part in _by_architecture(listing).items():
        found[arch] = {}
        for name, *numbers in line.findall(part):
            registers, stack, shared, local = map(int, numbers)
            if arch >= SYSTEM_SHARED_FROM and shared:
                shared -= SYSTEM_SHARED_BYTES
            found[arch][name] = Resources(registers, shared, stack, local)
    return found


def _instructions(assembly: str) -> dict[int, dict[str, list[str]]]:
    found: dict[int, dict[str, list[str]]] = {}
    for arch, part in _by_architecture(assembly).items():
        functions = re.split(r"^\s*Function : (\w+)$", part, flags=re.M)
        found[arch] = {
            name: re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.+?) ;", body, flags=re.M)
            for name, body in zip(functions[1::2], functions[2::2], strict=True)
        }
    return found


def float_atomics(instructions: list[str]) -> list[str]:
    """The instructions that add floats in an order which nobody decides."""
    found = []
    for i, instruction in enumerate(instructions):
        before = instructions[max(0, i - BEFORE_SWAP) : i]
        swaps_sum = SWAP.search(instruction) and any(FLOAT_SUM.search(other) for other in before)
        if FLOAT_ATOMIC.search(instruction) or swaps_sum:
            found.append(instruction)
    return found


# ---- NVRTC of CUDA 12 ------------------------------------------------------------------------


@cache
def _nvrtc() -> Any:
    return ctypes.CDLL(str(wheel_file("nvidia-cuda-nvrtc-cu12", "libnvrtc.so.12")))


def compile_with_nvrtc12(source: str, options: Sequence[str], architecture: int) -> str:
    """What stops the compiler, or its warnings; empty where it gives machine code without one."""
    arguments = [*options, *ADDED, *ADDED_FOR_NVRTC, f"-arch=sm_{architecture}"]
    arguments += ["--ptxas-options=-warn-spills"]
    key = [source, *arguments, metadata.version("nvidia-cuda-nvrtc-cu12")]
    return _kept(key, lambda: [_call_nvrtc(source, arguments)])[0]


def _call_nvrtc(source: str, arguments: list[str]) -> str:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    flags = [argument.encode() for argument in arguments]

    def text(of: str) -> bytes:
        size = ctypes.c_size_t()
        assert not getattr(nvrtc, f"nvrtcGet{of}Size")(program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        assert not getattr(nvrtc, f"nvrtcGet{of}")(program, room)
        return room.raw

    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    assert not created, created
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = text("ProgramLog").rstrip(b"\0").decode().strip()
        if failed or log:
            return log or f"NVRTC's error {failed}"
        return "" if text("CUBIN").startswith(b"\x7fELF") else "no machine code"
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


# ---- all kernels -----------------------------------------------------------------------------

Source = tuple[str, str]  # the file's name without its ending, the float type
# Wheels are there for it alone of what the tests run on.
IS_HERE = sys.platform == "linux" and platform.machine() == "x86_64"
SOURCES = [(name, dtype) for name in kernel_files() for dtype in REALS]
LARGEST_FIRST = sorted(SOURCES, key=lambda source: -len(source_of(source[0])))


def kernels_of(name: str) -> list[str]:
    """The kernels that a file defines."""
    return [kernel["name"] for kernel in KERNEL.finditer(source_of(name))]


def disassembled(source: Source) -> Sequence[int]:
    """The architectures whose instructions are worth the seconds that reading them takes."""
    name, dtype = source
    architectures = ARCHITECTURES[dtype]
    return architectures if DEPENDS_ON_ARCHITECTURE.search(source_of(name)) else architectures[-1:]


@cache
def compiled() -> dict[Source, Compiled]:
    """Every file for both types, by CUDA 13."""

    def compile_one(source: Source) -> Compiled:
        name, dtype = source
        return compile_with_nvcc(
            source_of(name), options_of(dtype), ARCHITECTURES[dtype], disassembled(source)
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = pool.map(compile_one, LARGEST_FIRST)
        return dict(zip(LARGEST_FIRST, results, strict=True))


@cache
def compiled_by_nvrtc12() -> dict[tuple[Source, int], str]:
    """What CUDA 12 says to each of them on some architectures."""
    cases = [(source, arch) for source in LARGEST_FIRST for arch in NVRTC12_ARCHITECTURES[source[1]]]

    def say(case: tuple[Source, int]) -> str:
        (name, dtype), architecture = case
        return compile_with_nvrtc12(source_of(name), options_of(dtype), architecture)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(cases, pool.map(say, cases), strict=True))


Budget = dict[str, dict[str, dict[str, list[int]]]]


def measured() -> Budget:
    """By file, kernel and float type: the most registers and bytes of shared memory."""
    budget: Budget = {}
    for (file, dtype), result in compiled().items():
        if result.log:
            raise RuntimeError(result.log)
        for name in kernels_of(file):
            each = [result.resources[arch][name] for arch in ARCHITECTURES[dtype]]
            most = [max(r.registers for r in each), max(r.shared_bytes for r in each)]
            budget.setdefault(file, {}).setdefault(name, {})[dtype] = most
    return budget


def read_budget() -> Budget:
    """What is checked in."""
    return tomllib.loads(BUDGET.read_text(encoding="utf-8"))


def write_budget() -> None:
    """Overwrite what is checked in by what is measured."""
    lines = [
        "# What each kernel takes at most of a multiprocessor, over the architectures of toolchain.py:",
        "# registers of a thread, and bytes of a block's shared memory. Compiled, not run.",
        f"# By nvcc {metadata.version('nvidia-cuda-nvcc')}: python -m tests.cuda.toolchain --write",
    ]
    for file, kernels in sorted(measured().items()):
        lines += ["", f"[{file}]"]
        for name, by_type in sorted(kernels.items()):
            lines.append(f"{name} = {{ " + ", ".join(f"{t} = {n}" for t, n in by_type.items()) + " }")
    BUDGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="The resources of all kernels.")
    parser.add_argument("--write", action="store_true", help=f"into {BUDGET.name}")
    if not parser.parse_args().write:
        parser.print_help()
        sys.exit(2)
    write_budget()


if __name__ == "__main__":
    main()
