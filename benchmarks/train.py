"""Training speed beside PyTorch: the same weights, batches and optimiser, in turn, on an idle machine.

    python -m benchmarks.train [--size A|B] [--model dense|smoe|mhmoe] [--threads N] [--json]

The peer runs in its own process with a memory allocator that keeps what it frees. Both sides first
compute the loss of the first batch; if they disagree nothing is reported. Then they make a few steps in
turn, A B A B; the figures are those of each side's fastest turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.torch_peer import SIZES, benchmark_config
from mhmoe_np.config import ModelConfig
from mhmoe_np.model.language_model import Batch, Losses, Model, loss_and_gradient
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.run_folder import environment
from mhmoe_np.tensors import save_tensors

BATCHES = 8
STEPS_PER_TURN = 2
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
SETTINGS = AdamWSettings(6e-4, 0.9, 0.95, 1e-6, 0.1)
CLIP_NORM = 2.0


class Ours:
    """Our side: the training step of `mhmoe_np.train` on given batches."""

    def __init__(self, config: ModelConfig, tokens: np.ndarray, threads: int) -> None:
        self._parameters, self._gradient, self._first, self._second = (
            Parameters(config, np.float32) for _ in range(4)
        )
        initialise(self._parameters, seed=0)
        self._ops = load_operations("numba", threads=threads, keep_buffers=True)
        self._model = Model.of(self._parameters, ops=self._ops)
        self._batches = [
            Batch(np.ascontiguousarray(batch[:, :-1]), np.ascontiguousarray(batch[:, 1:]))
            for batch in tokens
        ]
        self._step = 0

    def save(self, path: Path) -> None:
        save_tensors(path, self._parameters.tensors)

    def loss(self) -> Losses:
        losses, _ = loss_and_gradient(self._model, self._gradient, self._batches[:1], ops=self._ops)
        self._gradient.flat_P[...] = 0
        return losses

    def steps(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            batch = self._batches[self._step % len(self._batches)]
            loss_and_gradient(self._model, self._gradient, [batch], ops=self._ops)
            norm = self._ops.sum_of_squares(self._gradient.flat_P) ** 0.5
            self._step += 1
            self._ops.adamw_in_place(
                self._parameters.flat_P,
                self._gradient.flat_P,
                self._first.flat_P,
                self._second.flat_P,
                step=self._step,
                gradient_scale=min(1.0, CLIP_NORM / norm),
                settings=SETTINGS,
            )
        return time.perf_counter() - start


class Peer:
    """The other side, by its line protocol."""

    def __init__(self, arguments: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.torch_peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **KEEP_MEMORY},
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer ended early")
        return line.strip()

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self._process.communicate("quit\n")


def measure(size: str, model: str, threads: int, repeats: int) -> dict[str, object]:
    """One row of the report.

    Raises SystemExit: the two sides' losses differ by more than float32 rounding.
    """
    config = benchmark_config(size, model)
    batch, sequence = SIZES[size].batch, config.max_position_embeddings
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (BATCHES, batch, sequence + 1))
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, tokens, threads)
        weights, token_file = Path(folder, "weights.safetensors"), Path(folder, "tokens.npy")
        ours.save(weights)
        np.save(token_file, tokens)
        peer = Peer(
            [
                *("--size", size, "--model", model, "--threads", str(threads)),
                *("--weights", str(weights), "--tokens", str(token_file)),
            ]
        )
        mine, theirs = ours.loss(), [float(x) for x in peer.ask("loss").split()]
        for name, a, b in zip(("nll", "loss"), (mine.nll, mine.loss), theirs, strict=True):
            if abs(a - b) > 2e-5 * abs(b):
                raise SystemExit(f"the sides disagree on {name}: {a} and {b}; nothing is reported")
        ours.steps(1), peer.ask("steps 1")
        turns = [
            (ours.steps(STEPS_PER_TURN), float(peer.ask(f"steps {STEPS_PER_TURN}")))
            for _ in range(repeats)
        ]
        peer.end()
    per_turn = STEPS_PER_TURN * batch * sequence
    best_ours, best_peer = (per_turn / min(side) for side in zip(*turns, strict=True))
    return {
        "size": size,
        "model": model,
        "peer": "torch",
        "threads": threads,
        "ours_tokens_per_s": round(best_ours),
        "peer_tokens_per_s": round(best_peer),
        "ratio": round(best_ours / best_peer, 3),
        "median_ratio": round(float(np.median([b / a for a, b in turns])), 3),
        "loss_difference": abs(mine.loss - theirs[1]),
        "load_average": os.getloadavg()[0],
        "machine": environment(threads=threads, backend="numba")["processor"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["A", "B"], default="A")
    parser.add_argument("--model", choices=["dense", "smoe", "mhmoe"], default="mhmoe")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    row = measure(arguments.size, arguments.model, arguments.threads, arguments.repeats)
    if arguments.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:20s} {value}")


if __name__ == "__main__":
    main()
