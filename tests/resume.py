"""Kill a run with SIGKILL at random moments, go on each time, and compare with a straight run.

    python -m tests.resume [--kills 200] [--steps 20000] [--seed 0]

The kills fall into preparation, training with its checkpoints, evaluation and packing. Prints the
sha256 of weights, optimiser's state, scores and packed weights of both runs; exits with 1 if they
differ, or if a stage ended before it was killed as often as it should.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mhmoe_np.storage.checksums import unseal

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
quantization = "{quantization}"

[training]
steps = {steps}
batch_size = 4
sequence_length = 32
checkpoint_every = 3

[optimizer]
warmup_steps = 5
"""
MAIN = [sys.executable, "-c", "from mhmoe_cli.main import main; main()"]
LONGEST_MOMENT = 0.03  # seconds: some steps and the checkpoints between them
FILES = ("model.safetensors", "optimizer.safetensors")
SHARES = {"preparation": 0.15, "training": 0.6, "evaluation": 0.15, "packing": 0.1}  # of the kills


def command(folder: Path, out: str) -> list[str]:
    """Start or continue a run."""
    return [
        *(*MAIN, "train", str(folder / "config.toml")),
        *("--out", str(folder / out), "--resume", "auto", "--data", str(folder / "text.txt")),
    ]


def packing(folder: Path, run: str) -> list[str]:
    """Pack a run's last checkpoint, as `RUN-packed`."""
    return [*MAIN, "pack", str(folder / run), "--out", str(folder / f"{run}-packed")]


def digests(run: Path) -> dict[str, str]:
    """File name -> sha256, of the run's last checkpoint."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in FILES}


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(folder: Path, steps: int, quantization: str = "none") -> None:
    """A small text and a configuration."""
    words = random.Random(1).choices(
        ["the", "whale", "a", "ship", "sea", "of", "and", "captain"], k=9000
    )
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "config.toml").write_text(SETTINGS.format(steps=steps, quantization=quantization))


def straight(folder: Path) -> tuple[dict[str, str], float]:
    """The digests of an uninterrupted run, and its seconds."""
    seconds = finish(command(folder, "straight"))
    return digests(folder / "straight"), seconds


def killed(folder: Path, kills: int, steps: int, seed: int) -> tuple[dict[str, str], int]:
    """The digests of a run of `steps` killed up to `kills` times, and how often it really was."""
    hits = kill_training(folder, kills, steps, random.Random(seed))
    finish(command(folder, "killed"))
    return digests(folder / "killed"), hits


def kill_training(folder: Path, kills: int, steps: int, rng: random.Random) -> int:
    """Each kill comes a moment after a step of the run's first half, so that it never ends before."""
    hits = 0
    for step in sorted(rng.sample(range(1, steps // 2), kills)):
        process = begin(command(folder, "killed"))
        while process.poll() is None and _steps_made(folder / "killed") < step:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, LONGEST_MOMENT))
        process.kill()
        hits += process.wait() == -signal.SIGKILL
    return hits


def kill_preparation(folder: Path, kills: int, rng: random.Random) -> int:
    """Each time from nothing, or from what the kill before left behind."""
    start, process = time.perf_counter(), begin(command(folder, "timed"))
    while not (folder / "timed").exists():
        time.sleep(0.001)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    hits = 0
    while hits < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        # Half of them in the last fifth, where files are written.
        first = rng.choice((0.0, 0.8)) * seconds
        hits += kill_within(command(folder, "killed"), first, 1.1 * seconds, rng)
    return hits


def kill_evaluation(folder: Path, kills: int, rng: random.Random) -> int:
    """After the last step, each time as if the scores had not been written."""
    finish(command(folder, "killed"))
    unseal(folder / "killed", "evaluation.json")
    seconds = finish(command(folder, "killed"))
    hits = 0
    while hits < kills:
        unseal(folder / "killed", "evaluation.json")
        hits += kill_within(command(folder, "killed"), 0, seconds, rng)
    return hits


def kill_packing(folder: Path, kills: int, rng: random.Random) -> int:
    """Until there is a packed model, and again from nothing."""
    out = folder / "killed-packed"
    seconds = finish(packing(folder, "killed"))
    hits = 0
    while hits < kills:
        shutil.rmtree(out, ignore_errors=True)
        hits += kill_within(packing(folder, "killed"), 0.3 * seconds, seconds, rng)
    shutil.rmtree(out, ignore_errors=True)
    return hits


def begin(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a command."""
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(arguments: list[str]) -> float:
    """Let a command end well; its seconds."""
    start = time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True, timeout=900)
    return time.perf_counter() - start


def kill_within(arguments: list[str], first: float, last: float, rng: random.Random) -> bool:
    """Start a command and kill it after so many seconds; whether it was still there."""
    process = begin(arguments)
    time.sleep(rng.uniform(first, last))
    process.kill()
    return process.wait() == -signal.SIGKILL


def _steps_made(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def everything(folder: Path, run: str) -> dict[str, str]:
    """The digests of all that a run ends with, packed weights included."""
    return {
        **digests(folder / run),
        "evaluation.json": sha256(folder / run / "evaluation.json"),
        "packed.safetensors": sha256(folder / f"{run}-packed" / "packed.safetensors"),
    }


def main() -> None:
    """Compare the two runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares = {stage: round(share * arguments.kills) for stage, share in SHARES.items()}
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.steps, quantization="bitnet_b158")
        seconds = finish(command(folder, "straight"))
        finish(packing(folder, "straight"))
        hits = {
            "preparation": kill_preparation(folder, shares["preparation"], rng),
            "training": kill_training(folder, shares["training"], arguments.steps, rng),
            "evaluation": kill_evaluation(folder, shares["evaluation"], rng),
            "packing": kill_packing(folder, shares["packing"], rng),
        }
        finish(command(folder, "killed"))
        finish(packing(folder, "killed"))
        first, second = everything(folder, "straight"), everything(folder, "killed")
        left = sorted(path.name for path in folder.rglob(".tmp-*"))
    print(f"straight run: {seconds:.1f} s; the other was killed: {hits}, {sum(hits.values())} times")
    for file in first:
        print(f"{file:24s} {first[file]}  {second[file]}")
    print("same" if first == second else "DIFFERENT")
    if left:
        print(f"left behind: {left}")
    if hits != shares:
        print("the run ended too soon to be killed that often; raise --steps")
    sys.exit(first != second or hits != shares or bool(left))


if __name__ == "__main__":
    main()
