"""One side of a comparison: a process that answers a line with a line.

    python -m benchmarks.SIDE --size A --model mhmoe --threads 2 --work train --weights W --tokens T

`ready` comes once, when it has loaded. Then `loss` -> the mean NLL and the loss of the first batch;
`train N` and `evaluate N` -> the seconds that N steps, or N batches forward, took; `memory` -> the
process's peak in bytes; `sgemm` -> its best GFLOP/s of a large product; `blas` -> the library of its
products, as JSON; `quit` ends it. The tokens are an integer array [batches, B, T+1], used in turn; the
weights have the names of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from benchmarks.sizes import MODELS, SIZES
from mhmoe_np.operations.table import Blas
from mhmoe_np.settings.run import OptimizerConfig

SGEMM = 2048  # rows and columns of the large product
SGEMM_SECONDS = 1.0
OPTIMIZER = OptimizerConfig(schedule="constant", warmup_steps=0)
"""What every side trains with: the product's own numbers, at the peak of the rate."""


class Side(Protocol):
    """What a side can do."""

    def loss(self) -> tuple[float, float]: ...

    def train_step(self) -> None: ...

    def evaluate_batch(self) -> None: ...

    def product(self) -> tuple[Callable[[], object], float]:
        """A large float32 product, and its floating-point operations."""
        ...

    def blas(self) -> Blas: ...


class Options(argparse.Namespace):
    """The command line of a side."""

    size: str
    model: str
    threads: int
    weights: Path
    tokens: Path
    work: Literal["train", "evaluate"]
    compile: bool


def parser_of_sides(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--work", choices=["train", "evaluate"], required=True)
    parser.add_argument("--compile", action="store_true", help="PyTorch: through torch.compile")
    return parser


def read_options(description: str) -> Options:
    return parser_of_sides(description).parse_args(namespace=Options())


def serve(side: Side) -> None:
    """Answer requests until `quit` or the end of the input."""
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        print(_answer(side, line), flush=True)


def _answer(side: Side, request: str) -> str:
    match request.split():
        case ["loss"]:
            return " ".join(repr(value) for value in side.loss())
        case ["train", count]:
            return repr(_seconds(side.train_step, int(count)))
        case ["evaluate", count]:
            return repr(_seconds(side.evaluate_batch, int(count)))
        case ["memory"]:
            return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        case ["sgemm"]:
            call, operations = side.product()
            return repr(operations / _fastest(call) / 1e9)
        case ["blas"]:
            return json.dumps(side.blas()._asdict())
        case _:
            raise SystemExit(f"unknown request {request!r}")


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _fastest(call: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + SGEMM_SECONDS
    while time.perf_counter() < end:
        best = min(best, _seconds(call, 1))
    return best
