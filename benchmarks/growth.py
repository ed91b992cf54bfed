"""How cost grows: tokens/s and memory of training against one size at a time.

    python -m benchmarks.growth [--only sequence|experts|vocabulary|layers|threads]
                                [--blas own|openblas|mkl]

Starts from size A's MH-MoE. Writes `growth.json` and a plot of each curve into the machine's folder;
`benchmarks.readme` makes the page. Memory is what the model and the step take beyond the program
itself: parameters, gradient, moments, and the buffers of the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any, NamedTuple, cast

import numpy as np

from benchmarks.compare import environment_of_sides
from benchmarks.machines import add_blas_option, folder_of, machine, tag, use_blas, write_results
from benchmarks.numpy_side import SETTINGS
from benchmarks.parts import Stopwatch, breakdown
from benchmarks.report import draw_curve
from benchmarks.sizes import benchmark_config
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.training.step import Learner

GROWTH = "growth"  # the file's name; behind it a BLAS
STEPS = 3


class Curve(NamedTuple):
    """One curve: the size that changes, its values, and the tokens of a step."""

    key: str  # of the model's configuration; `threads` is none
    values: tuple[int, ...]
    tokens: int


CURVES = {
    "sequence": Curve("max_position_embeddings", (256, 512, 1024, 2048, 4096, 8192), 8192),
    "experts": Curve("num_experts", (8, 16, 32, 64, 128, 256, 512, 1024), 8192),
    "vocabulary": Curve("vocab_size", (8192, 16384, 32768, 65536, 131072), 2048),
    "layers": Curve("num_hidden_layers", (1, 2, 4, 8, 16), 2048),
    "threads": Curve("threads", tuple(range(1, cores() + 1)), 2048),
}


def measure(curve: Curve, value: int) -> dict[str, Any]:
    """One point, in this process."""
    settings = benchmark_config("A", "mhmoe").model_dump()
    threads = cores()
    if curve.key == "threads":
        threads = value
    else:
        settings[curve.key] = value
    config = ModelConfig.model_validate(settings)
    sequence = config.max_position_embeddings
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (max(1, curve.tokens // sequence), sequence + 1))
    batch = Batch.of(tokens)
    parameters = Parameters(config, np.float32)
    initialise(parameters, seed=0)
    ops = load_operations("numba", threads=threads, keep_buffers=True)
    stopwatch = Stopwatch(ops)
    learner = Learner(
        parameters, Moments.zeros(config, np.float32), updates=0, ops=cast(Operations, stopwatch)
    )
    stopwatch.watch(learner.model.weights)

    def step() -> None:
        learner.step([batch], SETTINGS)

    step()
    parts = min((breakdown(step, stopwatch, 1) for _ in range(STEPS)), key=lambda p: sum(p.values()))
    blas = ops.blas()
    return {
        "blas": None if blas is None else blas._asdict(),
        "value": value,
        "tokens_per_s": round(batch.input_BT.size / sum(parts.values()) * 1e3),
        "parts_ms": parts,
        "model_mb": round(4 * parameters.flat_P.nbytes / 1e6, 1),
        "step_mb": round(ops.buffer_bytes() / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=CURVES, action="append")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    add_blas_option(parser)
    options = parser.parse_args()
    use_blas(options.blas)
    if options.point is not None:
        print(json.dumps(measure(CURVES[options.only[0]], options.point)))
        return
    folder = folder_of(machine())
    for name in options.only or CURVES:
        points = []
        for value in CURVES[name].values:
            output = subprocess.run(
                [sys.executable, "-m", "benchmarks.growth", "--only", name, "--point", str(value)],
                env=environment_of_sides(),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            points.append(json.loads(output))
            blas = points[-1].pop("blas")
            print(name, json.dumps(points[-1]), flush=True)
        file = f"{GROWTH}{tag(blas)}"
        path = folder / f"{file}.json"
        results = json.loads(path.read_text("utf-8")) if path.exists() else {}
        results[name] = {
            "key": CURVES[name].key,
            "tokens": CURVES[name].tokens,
            "machine": machine(),
            "blas": blas,
            "points": points,
        }
        write_results(folder, file, results)
        draw_curve(name, results[name], folder / f"growth-{name}{tag(blas)}.png")


if __name__ == "__main__":
    main()
