"""Two sides in turn, A B A B, each in its own process: who does more tokens a second.

The peer gets an allocator that keeps what it frees. On both sides OpenBLAS and MKL choose their kernels
themselves, whatever the environment says. First both compute the loss of one batch: if they disagree,
nothing is reported. A turn during which other processes took a noticeable share of the machine is
dropped and made again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil

from benchmarks.machines import machine
from benchmarks.sizes import BITNET, SIZES, benchmark_config
from mhmoe_np.costs.model import macs_per_token
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.storage.tensors import save_tensors

Work = Literal["train", "evaluate"]
PEERS = {
    "torch": ("benchmarks.torch_side",),
    "torch-compile": ("benchmarks.torch_side", "--compile"),
    "hf-mixtral": ("benchmarks.hf_side",),
}
TURN_SECONDS = 0.7  # at least so long is a turn, in whole steps
LOSS_TOLERANCE = 2e-5  # relative, of float32 rounding
BITNET_TOLERANCE = 2e-4  # activations at a tie may quantise apart
MEMORY_KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
FORCED_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_ENABLE_INSTRUCTIONS")


def environment_of_sides() -> dict[str, str]:
    """Ours, without a forced choice of kernels."""
    return {key: value for key, value in os.environ.items() if key not in FORCED_KERNELS}


class Process:
    """One side, by its line protocol."""

    def __init__(
        self, module: str, arguments: list[str], allocator: dict[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment_of_sides(), **(allocator or {})},
        )
        self._name = module
        self._usage = psutil.Process(self._process.pid)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended early")
        return line.strip()

    def say(self, line: str) -> str:
        """The answer to a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask(self, line: str) -> list[float]:
        """The numbers that answer a request."""
        return [float(number) for number in self.say(line).split()]

    def processor_seconds(self) -> float:
        times = self._usage.cpu_times()
        return times.user + times.system

    def end(self) -> None:
        self._process.communicate("quit\n")


class Turn(NamedTuple):
    """One turn of one side."""

    seconds: float  # a step
    foreign: float  # the share of the machine that others took


def usable_processors() -> set[int]:
    """Those that this process may use; all, where a system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(psutil.cpu_count()))


def idle_seconds(usable: set[int]) -> float:
    """Of some processors, together."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[i].idle + getattr(times[i], "iowait", 0.0) for i in usable)


def take_turn(side: Process, work: Work, steps: int) -> Turn:
    """Let one side work, and see who else did."""
    usable = usable_processors()
    before, own, start = idle_seconds(usable), side.processor_seconds(), time.perf_counter()
    seconds = side.ask(f"{work} {steps}")[0]
    elapsed = time.perf_counter() - start
    possible = elapsed * len(usable)
    busy = possible - (idle_seconds(usable) - before)
    foreign = (busy - (side.processor_seconds() - own)) / possible
    return Turn(seconds / steps, max(0.0, foreign))


def interleave(
    sides: list[Process], work: Work, warm_steps: int, repeats: int, disturbed: float
) -> tuple[list[list[float]], int]:
    """Seconds a step of each side's undisturbed turns, and how many rounds were dropped.

    Raises SystemExit: the machine is busy with something else.
    """
    steps = []
    for side in sides:
        side.ask(f"{work} {warm_steps}")
        steps.append(max(1, round(TURN_SECONDS / side.ask(f"{work} 1")[0])))
    kept: list[list[float]] = [[] for _ in sides]
    rounds = 0
    while len(kept[0]) < repeats:
        if rounds == 4 * repeats:
            raise SystemExit("other processes disturb the measurement; end them and try again")
        rounds += 1
        turns = [take_turn(side, work, count) for side, count in zip(sides, steps, strict=True)]
        if max(turn.foreign for turn in turns) <= disturbed:
            for times, turn in zip(kept, turns, strict=True):
                times.append(turn.seconds)
    return kept, rounds - repeats


def tolerance_of(model: str) -> float:
    """How far the two sides' losses of a model may lie apart, relative to the peer's."""
    return BITNET_TOLERANCE if model.endswith(BITNET) else LOSS_TOLERANCE


def check_agreement(ours: list[float], peers: list[float], *, tolerance: float) -> None:
    """Both sides' NLL and loss.

    Raises SystemExit: they are not numbers, or differ by more than `tolerance`, relative to the peer's.
    """
    for name, mine, theirs in zip(("nll", "loss"), ours, peers, strict=True):
        if not abs(mine - theirs) <= tolerance * abs(theirs):
            raise SystemExit(f"the sides disagree on {name}: {mine} and {theirs}; no report")


def compare(
    size: str,
    model: str,
    peer: str,
    work: Work,
    *,
    threads: int,
    batches: int,
    repeats: int,
    disturbed: float,
) -> dict[str, Any]:
    """One row of the report.

    batches: so many different ones take turns; each is seen once before anything is timed, for
    torch.compile compiles again as shapes change.
    disturbed: the foreign share of the machine that spoils a turn.

    Raises SystemExit: the two sides' losses differ by more than rounding, or the machine is busy.
    """
    config = benchmark_config(size, model)
    batch, window = SIZES[size].batch, config.max_position_embeddings
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        weights, tokens = Path(folder, "weights.safetensors"), Path(folder, "tokens.npy")
        parameters = Parameters(config, np.float32)
        initialise(parameters, seed=0)
        save_tensors(weights, parameters.tensors)
        np.save(tokens, rng.integers(0, config.vocab_size, (batches, batch, window + 1)))
        arguments = [
            *("--size", size, "--model", model, "--threads", str(threads)),
            *("--work", work, "--weights", str(weights), "--tokens", str(tokens)),
        ]
        module, *extra = PEERS[peer]
        ours = Process("benchmarks.numpy_side", arguments)
        other = Process(module, arguments + extra, MEMORY_KEEPING)
        losses = ours.ask("loss"), other.ask("loss")
        check_agreement(*losses, tolerance=tolerance_of(model))
        (our_seconds, peer_seconds), dropped = interleave(
            [ours, other], work, batches + 1, repeats, disturbed
        )
        memory = ours.ask("memory")[0], other.ask("memory")[0]
        blas, peer_blas = (json.loads(side.say("blas")) for side in (ours, other))
        sgemm = max(ours.ask("sgemm")[0], other.ask("sgemm")[0])
        ours.end(), other.end()
        parts = json.loads(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.parts", *arguments],
                env=environment_of_sides(),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
    per_step = batch * window
    passes = 3 if work == "train" else 1  # the backward of a product is two products
    operations = 2 * passes * sum(macs_per_token(config, window).values())
    best_ours, best_peer = per_step / min(our_seconds), per_step / min(peer_seconds)
    return {
        "size": size,
        "model": model,
        "peer": peer,
        "work": work,
        "threads": threads,
        "ours_tokens_per_s": round(best_ours),
        "peer_tokens_per_s": round(best_peer),
        "ratio": round(best_ours / best_peer, 3),
        "median_ratio": round(
            statistics.median(b / a for a, b in zip(our_seconds, peer_seconds, strict=True)), 3
        ),
        "mfu": round(best_ours * operations / sgemm / 1e9, 3),
        "peer_mfu": round(best_peer * operations / sgemm / 1e9, 3),
        "sgemm_gflops": round(sgemm, 1),
        "rss_ratio": round(memory[0] / memory[1], 3),
        "ours_peak_mb": round(memory[0] / 1e6, 1),
        "peer_peak_mb": round(memory[1] / 1e6, 1),
        "loss_difference": abs(losses[0][1] - losses[1][1]),
        "rounds": repeats,
        "disturbed_rounds": dropped,
        "parts_ms": parts,
        "blas": blas,
        "peer_blas": peer_blas,
        "machine": machine(),
    }
