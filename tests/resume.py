"""Kill a training run with SIGKILL at random moments, resume it, and compare with a straight run.

    python -m tests.resume [--kills 20] [--steps 20000] [--seed 0]

Prints the sha256 of the weights and of the optimiser's state of both runs; exits with 1 if
they differ, or if the run ended before it was killed that often.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = """
[model]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 32
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
moe_heads = 2

[training]
steps = {steps}
batch_size = 4
sequence_length = 32
checkpoint_every = 3

[optimizer]
warmup_steps = 5
"""
LONGEST_MOMENT = 0.03  # seconds: some steps and the checkpoints between them
FILES = ("model.safetensors", "optimizer.safetensors")


def command(folder: Path, out: str) -> list[str]:
    """Start or continue a run."""
    return [
        *(sys.executable, "-c", "from mhmoe_cli.main import main; main()", "train"),
        *(str(folder / "config.toml"), "--out", str(folder / out), "--resume", "auto"),
        *("--data", str(folder / "text.txt")),
    ]


def digests(run: Path) -> dict[str, str]:
    """File name -> sha256, of the run's last checkpoint."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in FILES}


def prepare(folder: Path, steps: int) -> None:
    """A small text and a configuration."""
    words = random.Random(1).choices(
        ["the", "whale", "a", "ship", "sea", "of", "and", "captain"], k=9000
    )
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "config.toml").write_text(SETTINGS.format(steps=steps))


def straight(folder: Path) -> tuple[dict[str, str], float]:
    """The digests of an uninterrupted run, and its seconds."""
    start = time.perf_counter()
    subprocess.run(command(folder, "straight"), check=True, capture_output=True, timeout=600)
    return digests(folder / "straight"), time.perf_counter() - start


def killed(folder: Path, kills: int, steps: int, seed: int) -> tuple[dict[str, str], int]:
    """The digests of a run of `steps` killed up to `kills` times, and how often it really was.

    Each kill comes a moment after a step drawn from the first half of the run, so that the run does
    not end before.
    """
    rng = random.Random(seed)
    hits = 0
    for step in sorted(rng.sample(range(1, steps // 2), kills)):
        process = subprocess.Popen(
            command(folder, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _steps_made(folder / "killed") < step:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, LONGEST_MOMENT))
        process.kill()
        hits += process.wait() == -signal.SIGKILL
    subprocess.run(command(folder, "killed"), check=True, capture_output=True, timeout=600)
    return digests(folder / "killed"), hits


def _steps_made(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def main() -> None:
    """Compare the two runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.steps)
        first, seconds = straight(folder)
        second, hits = killed(folder, arguments.kills, arguments.steps, arguments.seed)
    print(f"straight run: {seconds:.1f} s; the other was killed {hits} times")
    for file in FILES:
        print(f"{file:24s} {first[file]}  {second[file]}")
    print("same" if first == second else "DIFFERENT")
    if hits < arguments.kills:
        print("the run ended too soon to be killed that often; raise --steps")
    sys.exit(first != second or hits < arguments.kills)


if __name__ == "__main__":
    main()
