"""Does `mhmoe-np plan` tell what `mhmoe-np train` then takes?

    python -m benchmarks.plan [--only small|paper] [--blas own|openblas|mkl] [--json]

For each of the paper's five models, at a quarter of its width and at the paper's, a forecast and then a
short run with the same settings: peak memory of the whole process, and the time of a step. All ten
together are written into `plan.json` in the machine's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare import environment_of_sides
from benchmarks.machines import add_blas_option, folder_of, machine, tag, use_blas, write_results
from mhmoe_np.settings.presets import PAPER_MODELS
from mhmoe_np.training.run_folder import METRICS

FORECASTS = "plan"  # the file's name; behind it a BLAS
COMMAND = (str(Path(sys.executable).with_name("mhmoe-np")),)
SETTINGS = {
    "small": ("--steps", "12"),
    # The paper's batch of 256 sequences of 2,048, a sequence at a time, is cut to two.
    "paper": (
        *("--steps", "3", "--set", "training.batch_size=2"),
        *("--set", "training.gradient_accumulation_steps=2"),
    ),
}


def forecast(settings: list[str]) -> dict[str, Any]:
    output = subprocess.run(
        [*COMMAND, "plan", *settings, "--json"],
        env=environment_of_sides(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    plan: dict[str, Any] = json.loads(output)
    return plan


def run(settings: list[str], out: Path) -> tuple[int, float]:
    """Peak bytes of a training process, and the median seconds of its steps after the first."""
    process = subprocess.Popen(
        [*COMMAND, "train", *settings, "--out", str(out)],
        env=environment_of_sides(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"train {' '.join(settings)} failed with status {status}")
    lines = [json.loads(line) for line in (out / METRICS).read_text("utf-8").splitlines()]
    tokens = lines[0]["tokens"]
    return usage.ru_maxrss * 1024, statistics.median(
        tokens / line["tokens_per_s"] for line in lines[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--json", action="store_true")
    add_blas_option(parser)
    options = parser.parse_args()
    use_blas(options.blas)
    rows = []
    for family in [options.only] if options.only else list(SETTINGS):
        for model in PAPER_MODELS:
            settings = ["--preset", f"{family}-{model}", *SETTINGS[family]]
            with tempfile.TemporaryDirectory() as folder:
                plan = forecast(settings)
                peak, seconds = run(settings, Path(folder, "run"))
            row = {
                "model": f"{family}-{model}",
                "planned_peak_mb": round(plan["memory"]["peak"] / 1e6, 1),
                "peak_mb": round(peak / 1e6, 1),
                "memory_error": round(plan["memory"]["peak"] / peak - 1, 3),
                "planned_step_s": round(plan["step_seconds"], 3),
                "step_s": round(seconds, 3),
                "time_error": round(plan["step_seconds"] / seconds - 1, 3),
            }
            rows.append(row)
            if not options.json:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if not options.only:
        found = {"machine": machine(), "blas": plan["blas"], "rows": rows}
        write_results(folder_of(machine()), f"{FORECASTS}{tag(plan['blas'])}", found)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
