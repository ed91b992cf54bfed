"""The cuda backend on a GPU: whole models beside PyTorch, operations beside their floors, products.

    python -m benchmarks.gpu [--sections ours-B torch-B ...] [--seconds 1] [--minutes 9.5]

Each section is a process of its own with a time of its own: what fails or takes too long loses its own
rows alone. After each `results/gpu-<device>-<date>.json` and `.md` say what was measured. Needs CuPy,
PyTorch for the peers, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_job import Job, Row
from benchmarks.gpu_report import write

RESULTS = Path(__file__).parent / "results"
MARK = "ROW "  # before a row on a section's standard output
LEAST_SECONDS = 15  # a section that has less left is not begun


class Section(NamedTuple):
    """What is measured in one process."""

    seconds: float  # after which it is ended
    rows: Callable[[Job], Iterator[Row]]


def _ours(job: Job, *, size: str) -> Iterator[Row]:
    from benchmarks.gpu_ours import whole_models

    yield from whole_models(job, size, "ours")


def _peer(job: Job, *, size: str, side: str) -> Iterator[Row]:
    from benchmarks.gpu_peer import whole_models

    yield from whole_models(job, size, side)


def _operations(job: Job, *, size: str) -> Iterator[Row]:
    from benchmarks.gpu_ours import single_operations

    yield from single_operations(job, size)


def _packed(job: Job) -> Iterator[Row]:
    from benchmarks.gpu_ours import packed_products

    yield from packed_products(job)


def _cublas(job: Job) -> Iterator[Row]:
    from benchmarks.gpu_peer import products

    yield from products(job)


SECTIONS = {
    "ours-B": Section(60, partial(_ours, size="B")),
    "torch-B": Section(45, partial(_peer, size="B", side="torch")),
    "ours-A": Section(45, partial(_ours, size="A")),
    "torch-A": Section(45, partial(_peer, size="A", side="torch")),
    "ours-paper": Section(100, partial(_ours, size="paper")),
    "torch-paper": Section(75, partial(_peer, size="paper", side="torch")),
    "operations-B": Section(45, partial(_operations, size="B")),
    "packed": Section(45, _packed),
    "cublas": Section(30, _cublas),
    "operations-paper": Section(60, partial(_operations, size="paper")),
    "operations-A": Section(30, partial(_operations, size="A")),
    "torch-compile-A": Section(90, partial(_peer, size="A", side="torch-compile")),
    "torch-compile-B": Section(90, partial(_peer, size="B", side="torch-compile")),
    "torch-compile-paper": Section(240, partial(_peer, size="paper", side="torch-compile")),
}
"""What matters most comes first: the time may not be enough for all."""


def missing() -> str | None:
    """What this machine lacks to measure anything; None: nothing."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install cupy-cuda13x (or cupy-cuda12x)"
    try:
        ctypes.CDLL("libcuda.so.1")
        import cupy

        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # A library that cannot be loaded, or CUDA's own error.
        return f"no GPU that CUDA can use: {str(error).partition(chr(10))[0]}"
    return None if devices else "no GPU"


def facts() -> dict[str, Any]:
    """The device, and the versions of all that the figures depend on."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    found: dict[str, Any] = {
        "device": properties["name"].decode(),
        "compute_capability": cupy.cuda.Device().compute_capability,
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "driver": _driver(),
        "cupy": getattr(cupy, "__version__", "none"),
        "python": sys.version.partition(" ")[0],
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    return found | {"date": date.today().isoformat()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.partition("\n")[0].strip()


# ---- one section -----------------------------------------------------------------------------


def run_section(name: str, job: Job, emit: Callable[[str], object] = print) -> None:
    """In this process; each row is printed as soon as it is there."""
    for row in SECTIONS[name].rows(job):
        emit(MARK + json.dumps({"section": name, **row}))
        sys.stdout.flush()


class Outcome(NamedTuple):
    """What came of a section."""

    rows: list[Row]
    seconds: float
    error: str | None


def in_a_process(command: list[str], seconds: float) -> Outcome:
    """Run a section's command; its rows are kept, whatever becomes of it, and all it says is shown."""
    start, rows, last = time.perf_counter(), [], ""
    late = threading.Event()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    rows.append(json.loads(line.removeprefix(MARK)))
                    print("  " + shown(rows[-1]), flush=True)
                elif line.strip():
                    last = line.strip()
                    print("  | " + last, flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()  # where it still runs: this side was interrupted
    error = None if code == 0 else f"ended after {seconds:.0f} s" if late.is_set() else last
    return Outcome(rows, time.perf_counter() - start, error)


def shown(row: Row) -> str:
    """A row on one line."""
    parts = [
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "section"
    ]
    return "; ".join(parts)


# ---- all of them -----------------------------------------------------------------------------


def run_all(names: list[str], seconds: float, minutes: float, results: Path) -> bool:
    """Every section in turn; whether all of them came to their end."""
    start, rows = time.perf_counter(), []
    report: dict[str, Any] = {"facts": facts(), "sections": {}, "rows": rows}
    print(shown(report["facts"]), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = 60 * minutes - (time.perf_counter() - start)
            print(f"{name} ({left:.0f} s left)", flush=True)
            if left < LEAST_SECONDS:
                report["sections"][name] = {"seconds": 0.0, "error": "no time was left"}
                continue
            command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
            command += ["--seconds", str(seconds), "--folder", folder]
            outcome = in_a_process(command, min(left, SECTIONS[name].seconds))
            rows += outcome.rows
            report["sections"][name] = {"seconds": outcome.seconds, "error": outcome.error}
            if outcome.error:
                print(f"  {name}: {outcome.error}", flush=True)
            write(report, results)
    print(f"written: {', '.join(map(str, write(report, results)))}")
    return all(section["error"] is None for section in report["sections"].values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long is a measurement")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which nothing more is begun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    lacking = missing()
    if lacking:
        print(f"benchmarks.gpu: {lacking}", file=sys.stderr)
        raise SystemExit(2)
    if options.section:
        run_section(options.section, Job(seconds=options.seconds, folder=options.folder))
    elif not run_all(options.sections, options.seconds, options.minutes, options.results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
