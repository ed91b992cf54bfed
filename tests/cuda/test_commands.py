"""The commands with `--backend cuda`, emulated, and runs that change their backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.audit.models import settings
from mhmoe_np.checkpoints.training_state import TrainerState
from mhmoe_np.errors import UserError
from mhmoe_np.operations.cuda import driver
from mhmoe_np.settings.run import parse_run_config
from mhmoe_np.training.run import resume_run, start_run
from tests.cuda.backend import cuda_operations, emulated_only
from tests.cuda.emulator.cupy_on_cpu import emulation

pytestmark = emulated_only
ROOT = Path(__file__).parents[2]
TABLES: dict[str, dict[str, Any]] = {
    "model": settings("mh2-shared") | {"vocab_size": 270},
    "training": {"steps": 4, "batch_size": 4, "sequence_length": 16, "checkpoint_every": 2},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text to train on; a driver is said to be there."""
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(4).choice(["a", "whale", "the", "sea"], 3000)
    Path("text.txt").write_text(" ".join(words))
    monkeypatch.setattr(driver, "check_driver", lambda: None)
    cuda_operations()
    return tmp_path


def tables(**training: Any) -> dict[str, Any]:
    return TABLES | {
        "data": {"paths": ["text.txt"]},
        "training": TABLES["training"] | training,
    }


def config(**training: Any) -> Any:
    return parse_run_config(tables(**training), source="test")


def state(run: Path, step: int) -> TrainerState:
    text = (run / "checkpoints" / f"step-{step:08d}" / "trainer_state.json").read_text()
    return TrainerState.model_validate(json.loads(text))


def test_a_run_goes_on_with_another_backend_and_says_so(folder: Path) -> None:
    run = folder / "run"
    trainer = start_run(run, config(), backend="numpy")
    trainer.train()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    trainer.close()
    assert state(run, 4).backend == "numpy"
    assert state(run, 4).changes == []
    for name in ("model.safetensors", "trainer_state.json"):
        assert (run / "checkpoints" / "step-00000004" / name).is_file()

    trainer = resume_run(run, {"training": {"steps": 6}}, backend="cuda")
    assert trainer.notices == [f"{run}: from step 4 on the backend is cuda; it was numpy"]
    trainer.train()
    trainer.close()
    assert state(run, 6).backend == "cuda"
    (change,) = state(run, 6).changes
    assert (change.step, change.key, change.before, change.now) == (4, "the backend", "numpy", "cuda")

    # The same six steps on one backend: the same losses but for rounding.
    whole = start_run(folder / "whole", config(steps=6), backend="numpy")
    whole.train()
    whole.close()
    expected = [
        json.loads(s)["loss"] for s in (folder / "whole/metrics.jsonl").read_text().splitlines()
    ]
    found = [json.loads(s)["loss"] for s in (run / "metrics.jsonl").read_text().splitlines()]
    assert found[:4] == losses
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_run_in_tf32_goes_on_elsewhere_once_it_is_told_float32(folder: Path) -> None:
    run = folder / "run"
    start_run(run, config(matmul="tf32"), backend="cuda").close()
    with pytest.raises(UserError, match="--backend cuda alone computes so; set it to float32"):
        resume_run(run, backend="numpy")
    trainer = resume_run(run, {"training": {"matmul": "float32"}}, backend="numpy")
    assert any("training.matmul is float32; it was tf32" in notice for notice in trainer.notices)
    trainer.close()


def test_an_interrupted_run_has_the_bits_of_a_straight_one(folder: Path) -> None:
    for name, sittings in (("straight", [6]), ("halves", [2, 6])):
        trainer = start_run(folder / name, config(steps=sittings[0]), backend="cuda")
        trainer.train()
        trainer.close()
        for steps in sittings[1:]:
            trainer = resume_run(folder / name, {"training": {"steps": steps}}, backend="cuda")
            trainer.train()
            trainer.close()
    last = [folder / name / "checkpoints" / "step-00000006" for name in ("straight", "halves")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes()


def test_too_little_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "device_bytes", 100_000)
    with pytest.raises(UserError, match=r"--backend cuda: .* GB are free; make the model or the batch"):
        start_run(folder / "run", config(), backend="cuda")


def emulated(folder: Path, *arguments: object, code: int = 0) -> str:
    """Run `mhmoe-np` with the backend emulated; what it printed."""
    command = [sys.executable, "-m", "tests.cuda.emulated_main", *map(str, arguments)]
    result = subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    return result.stdout


def test_the_commands_run_on_it(folder: Path) -> None:
    import tomli_w

    Path("run.toml").write_text(tomli_w.dumps(tables()))
    cuda = ("--backend", "cuda")
    emulated(folder, "train", "run.toml", "--out", "run", *cuda)
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert environment["backend"] == "cuda"
    assert environment["device"]["name"] == "emulated"
    text = emulated(folder, "generate", "run", "--prompt", "the sea", "--max-new-tokens", 4, *cuda)
    assert text.startswith("the sea")
    scores = [
        json.loads(emulated(folder, "eval", "run", "--domain", "t=text.txt", "--json", *backend))
        for backend in (cuda, ("--backend", "numpy"))
    ]
    nll = [score["domains"]["t"]["nll"] for score in scores]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)
    plan = json.loads(emulated(folder, "plan", "run.toml", "--json", *cuda))
    assert plan["device"]["total_bytes"] == emulation.device_bytes
    assert plan["memory"]["program"] == 0
    assert plan["memory"]["peak"] < plan["device"]["total_bytes"]
    assert "of emulated" in emulated(folder, "plan", "run.toml", *cuda)
    np.save("tokens.npy", np.arange(24).reshape(2, 12))
    for backend in ("cuda", "numpy"):
        emulated(
            folder,
            *("trace", "run", "--tokens", "tokens.npy", "--out", f"{backend}.safetensors"),
            *("--dtype", "float64", "--backend", backend),
        )
    from safetensors.numpy import load_file

    traces = [load_file(f"{backend}.safetensors") for backend in ("cuda", "numpy")]
    assert traces[0].keys() == traces[1].keys()
    for name, tensor in traces[1].items():
        np.testing.assert_allclose(traces[0][name], tensor, rtol=1e-9, atol=1e-10, err_msg=name)
