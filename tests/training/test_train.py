"""`mhmoe-np train` as a user runs it, on a small text."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mhmoe_np.checkpoints.checkpoint import find_checkpoint, load_model
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import unpack
from mhmoe_np.operations.table import PackedWeight
from tests.conftest import Run
from tests.resume import command, digests, killed, prepare, straight


def test_a_run_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    prepare(tmp_path, steps=100)
    expected, _ = straight(tmp_path)
    found, kills = killed(tmp_path, kills=4, steps=100, seed=3)
    assert kills == 4
    assert found == expected


def test_sigterm_saves_and_the_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    prepare(tmp_path, steps=200)
    expected, _ = straight(tmp_path)
    process = subprocess.Popen(command(tmp_path, "killed"), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "go on with" in said
    again = subprocess.run(command(tmp_path, "killed"), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "continuing at step" in again.stderr
    assert digests(tmp_path / "killed") == expected
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 201))
    finished = subprocess.run(command(tmp_path, "killed"), capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert "is finished" in finished.stderr


def test_a_run_that_compiles_its_kernels_has_the_bits_of_later_ones(
    mhmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense model: its kernels are a part of every other's."""
    prepare(tmp_path, steps=4)
    config = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(re.sub(r"(num_experts|moe)\w* = .*\n", "", config))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("MHMOE_NP_BLAS", "openblas")  # our own products are compiled for half a minute
    options = ("config.toml", "--data", "text.txt")
    compiled = mhmoe("train", *options, "--out", "first")
    assert "compiling kernels" in compiled.stderr
    read = mhmoe("train", *options, "--out", "second")
    assert "compiling kernels" not in read.stderr
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize("quantization", ["bitnet_b158", "bitnet"])
def test_a_quantised_run_logs_its_weights_and_resumes_with_the_same_bits(
    mhmoe_here: Run, tmp_path: Path, quantization: str
) -> None:
    prepare(tmp_path, steps=9)
    options = ("--set", f"quantization={quantization}", "--set", "schedule=two-stage")
    options += ("--set", "learning_rate=0.01", "--set", "keep_checkpoints=9")
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "straight", *options)
    straight = tmp_path / "straight"
    shutil.copytree(straight, tmp_path / "again")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}")
    mhmoe_here("train", "--resume", "again")
    assert digests(tmp_path / "again") == digests(straight)

    for run in (straight, tmp_path / "again"):
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == list(range(1, 10))
        for step in steps:
            shares = step["quantised"]
            assert shares["minus"] + shares["zero"] + shares["plus"] == pytest.approx(1)
            assert (shares["zero"] == 0) == (quantization == "bitnet")
        assert sum(step["quantised"]["flipped"] for step in steps) > 0
        matrices = [json.loads(line) for line in (run / "quantization.jsonl").read_text().splitlines()]
        assert [line["step"] for line in matrices] == [3, 6, 9]
        last = matrices[-1]["matrices"]
        assert sum(matrix["flipped"] for matrix in last.values()) == steps[-1]["quantised"]["flipped"]
        rows = {row["name"]: row for row in json.loads(mhmoe_here("inspect", run, "--json").stdout)}
        assert set(last) == {name for name, row in rows.items() if row["scale"] is not None}
        for name, matrix in last.items():
            size = matrix["minus"] + matrix["zero"] + matrix["plus"]
            assert rows[name]["scale"] == matrix["scale"]
            assert rows[name]["plus"] == matrix["plus"] / size


def test_flips_are_the_quantised_weights_that_a_step_changed(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=2)
    options = ("--set", "quantization=bitnet_b158", "--set", "learning_rate=0.01")
    options += ("--set", "warmup_steps=0", "--set", "schedule=constant", "--checkpoint-every", "1")
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run", *options)
    integers = []
    for step in (1, 2):
        checkpoint = f"run/checkpoints/step-{step:08d}"
        mhmoe_here("pack", checkpoint, "--out", f"packed-{step}")
        weights = load_model(tmp_path / f"packed-{step}", np.float32, ops=load_operations("numpy"))
        integers.append(
            [unpack(w.w) for w in weights.weights.arrays.values() if isinstance(w, PackedWeight)]
        )
    changed = sum(np.count_nonzero(a != b) for a, b in zip(*integers, strict=True))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["quantised"]["flipped"] == changed > 0


def test_train_then_eval_and_generate(mhmoe: Run, mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=30)
    trained = mhmoe(
        "train", "config.toml", "--data", "text.txt", "--out", "run", "--set", "hidden_size=48"
    )
    assert "bits/byte" in trained.stdout
    assert "sample:" in trained.stdout
    held_out = tmp_path / "run" / "validation" / "text.jsonl"
    scores = json.loads(mhmoe("eval", "run", "--domain", f"t={held_out}", "--json").stdout)
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["domains"]["t"] == saved["domains"]["text"]
    other = mhmoe_here("eval", "run", "--domain", f"t={held_out}", "--json", "--batch-tokens", 33)
    nll = json.loads(other.stdout)["domains"]["t"]["nll"]
    # float32 sums in another order
    assert nll == pytest.approx(scores["domains"]["t"]["nll"], rel=1e-6)
    text = json.loads(held_out.read_text())["text"]
    assert scores["domains"]["t"]["bytes"] == len(text.encode())
    assert scores["domains"]["t"]["words"] == len(text.split())

    options = ("--prompt", "the whale", "--max-new-tokens", 12, "--top-k", 20, "--top-p", 0.9)
    first = mhmoe("generate", "run", *options, "--seed", 1).stdout
    assert first.startswith("the whale")
    assert mhmoe_here("generate", "run", *options, "--seed", 1).stdout == first
    greedy = mhmoe_here("generate", "run", "--prompt", "", "--temperature", 0, "--max-new-tokens", 5)
    assert greedy.stdout.strip()

    refused = mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run", code=2)
    assert "--resume auto" in refused.stderr
    changed = mhmoe_here("train", "--resume", "run", "--set", "training.seed=1", code=2)
    assert "training.seed" in changed.stderr
    longer = mhmoe_here("train", "--resume", "run", "--steps", 33, "--set", "learning_rate=1e-4")
    assert "from step 30 on optimizer.learning_rate is 0.0001; it was 0.0006" in longer.stderr
    assert "continuing at step 30" in longer.stderr
    last = find_checkpoint(tmp_path / "run")
    assert last.name == "step-00000033"
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["config"]["optimizer"]["learning_rate"] == 1e-4
    assert [change["step"] for change in state["changes"]] == [30]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "qick"], ["qick", "'quick'"]),
        (["train", "--set", "hiden_size=3"], ["hiden_size", "'hidden_size'"]),
        (["train", "--set", "hidden_size=x"], ["model.hidden_size", "'x'"]),
        (["train", "--set", "learning_rate"], ["key=value"]),
        (["train", "--steps", "0"], ["training.steps"]),
        (["train", "--threads", "999"], ["--threads 999"]),
        (["train", "missing.toml"], ["missing.toml", "no such file"]),
        (["train", "--data", "missing.txt"], ["missing.txt"]),
        (["train", "--resume", "missing"], ["missing"]),
        (["train", "--set", "sequence_length=4096"], ["max_position_embeddings"]),
        (["trian"], ["'trian'", "'train'"]),
        (["eval", "missing", "--domain", "a=b"], ["missing"]),
        (["eval", "missing", "--domain", "ab"], ["NAME=PATH"]),
        (["eval", "missing"], ["missing"]),
        (["init", "missing.json", "--out", "x", "--seed", "0"], ["missing.json"]),
        (["generate", "missing", "--prompt", "x", "--top-p", "2"], ["--top-p"]),
        (["parity", "--heads", "5", "--top-k", "2"], ["heads", "768"]),
        (["parity", "--heads", "2"], ["--top-k"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    mhmoe_here: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = mhmoe_here(*arguments, code=2)
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == [] or list((tmp_path / "runs").iterdir()) == []


def test_a_damaged_checkpoint_is_named(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=3)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    weights = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = mhmoe_here("eval", "run", "--domain", "t=text.txt", code=2)
    assert "model.safetensors" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("quantization", ["none", "bitnet_b158", "bitnet"])
def test_a_loss_that_is_not_finite_ends_the_run_and_another_rate_goes_on(
    mhmoe_here: Run, tmp_path: Path, quantization: str
) -> None:
    prepare(tmp_path, steps=10)
    result = mhmoe_here(
        *("train", "config.toml", "--data", "text.txt", "--out", "run"),
        *("--set", f"quantization={quantization}"),
        *("--set", "learning_rate=1e30", "--set", "warmup_steps=0"),
        code=1,
    )
    failure = result.stderr.splitlines()[-1]
    assert "not finite: layer 0, " in failure
    assert "go on from the start with: mhmoe-np train --resume run" in failure
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    replayed = mhmoe_here("replay", "run/failure").stdout
    assert "first not finite: layer 0, " in replayed
    lower = mhmoe_here("train", "--resume", "run", "--set", "learning_rate=1e-4")
    assert "from step 0 on optimizer.learning_rate is 0.0001" in lower.stderr
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_new_run_starts_from_a_checkpoint(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=6)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "first")
    (tmp_path / "other.txt").write_text("the sea and the ship of a captain " * 300)
    options = ("--data", "other.txt", "--set", "sequence_length=16", "--set", "batch_size=2")
    tuned = mhmoe_here(
        *("train", "--init", "first", "--out", "tuned", "--steps", 4, *options),
        *("--checkpoint-every", 1, "--set", "keep_checkpoints=9", "--set", "learning_rate=1e-3"),
    )
    assert "training in tuned: 26,208 parameters, 4 steps" in tuned.stderr
    first = find_checkpoint(tmp_path / "first")
    start = tmp_path / "tuned" / "checkpoints" / "step-00000000"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (start / name).read_bytes() == (first / name).read_bytes()
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "tuned", again)
    for step in (2, 3, 4):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    mhmoe_here("train", "--resume", "again")
    assert digests(again) == digests(tmp_path / "tuned")

    shutil.rmtree(again / "checkpoints")
    assert "its checkpoints are gone" in mhmoe_here("train", "--resume", "again", code=2).stderr
    repeated = ("train", "config.toml", "--init", "first", "--data", "text.txt", "--out", "new")
    mhmoe_here(*repeated, "--resume", "auto")
    assert "is finished" in mhmoe_here(*repeated, "--resume", "auto").stderr
    both = mhmoe_here("train", "--init", "first", "--resume", "tuned", code=2)
    assert "give either --init or --resume" in both.stderr

    other = mhmoe_here(
        *("train", "config.toml", "--init", "first", "--data", "text.txt", "--out", "wider"),
        *("--set", "hidden_size=64"),
        code=2,
    )
    assert "model.safetensors" in other.stderr
    assert "shape" in other.stderr
    assert not (tmp_path / "wider").exists()
    mhmoe_here("init", str(first / "config.json"), "--out", "bare", "--seed", 0)
    without = mhmoe_here(
        "train", "config.toml", "--init", "bare", "--data", "text.txt", "--out", "x", code=2
    )
    assert "has no tokenizer.json" in without.stderr
    assert not (tmp_path / "x").exists()
