"""Scoring the held-out text while a run trains, and keeping the best model."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.checkpoints.checkpoint import (
    best_models_of,
    checkpoints_of,
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_model,
    step_of,
)
from mhmoe_np.errors import UserError
from mhmoe_np.inference.evaluate import evaluate
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.run import RunConfig, merge, parse_run_config, read_toml
from mhmoe_np.training import keeper, validation
from mhmoe_np.training.finish import finish_run
from mhmoe_np.training.keeper import TrainingFailure
from mhmoe_np.training.run import resume_run, start_run
from mhmoe_np.training.trainer import Trainer
from mhmoe_np.training.validation import HeldOutText
from tests.conftest import Run
from tests.resume import digests, prepare


def configured(folder: Path, **training: Any) -> RunConfig:
    """Seven steps; the learning rate is such that the held-out text is not best at the end."""
    prepare(folder, steps=7)
    (folder / "more.jsonl").write_text('{"text": "the ship and the sea of a whale"}\n' * 40)
    tables = read_toml(folder / "config.toml")
    over = {
        "data": {"paths": [str(folder / "text.txt"), str(folder / "more.jsonl")]},
        "optimizer": {"learning_rate": 0.3, "warmup_steps": 1, "schedule": "constant"},
        "training": {"eval_every": 2, "checkpoint_every": 3, **training},
    }
    return parse_run_config(merge(tables, over), source="test")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept every checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    config = configured(folder, keep_checkpoints=9, checkpoint_every=1)
    trainer = start_run(folder / "run", config, backend="numpy")
    trainer.train()
    finish_run(trainer)
    trainer.close()
    return folder / "run"


def test_every_n_steps_and_at_the_end_each_domain_is_scored(straight: Path) -> None:
    ops = load_operations("numpy")
    lines = lines_of(straight)
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        checkpoint = straight / "checkpoints" / f"step-{line['step']:08d}"
        model = load_model(checkpoint, np.float32, ops=ops)
        tokenizer = load_checkpoint_tokenizer(checkpoint)
        scores = {
            text.name: evaluate(model, text, ops=ops)
            for text in HeldOutText(straight, tokenizer).texts()
        }
        assert line["domains"] == {name: score.as_dict() for name, score in scores.items()}
        nll = sum(score.nll for score in scores.values())
        assert line["mean_nll"] == nll / sum(score.tokens for score in scores.values())


def test_the_best_model_is_kept_and_has_a_name(straight: Path) -> None:
    lines = lines_of(straight)
    best = min(lines, key=lambda line: line["mean_nll"])
    assert best["step"] != lines[-1]["step"]  # else nothing is shown
    assert [step_of(path) for path in best_models_of(straight)] == [best["step"]]
    found = find_checkpoint(straight / "checkpoints" / "best")
    same = straight / "checkpoints" / f"step-{best['step']:08d}"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (found / name).read_bytes() == (same / name).read_bytes()
    assert not (found / "optimizer.safetensors").exists()
    assert find_checkpoint(straight) == checkpoints_of(straight)[-1]


def test_the_last_steps_scores_are_the_final_ones(straight: Path) -> None:
    final = json.loads((straight / "evaluation.json").read_text())
    assert final["domains"] == lines_of(straight)[-1]["domains"]
    assert (final["protocol"], final["window"], final["stride"], final["bos"]) == (
        "disjoint",
        32,
        None,
        False,
    )


def test_commands_take_the_best_model_by_its_name(straight: Path, mhmoe_here: Run) -> None:
    best = straight / "checkpoints" / "best"
    held_out = straight / "validation" / "text.jsonl"
    backend = ("--backend", "numpy")
    printed = mhmoe_here("eval", best, "--domain", f"text={held_out}", "--json", *backend).stdout
    line = min(lines_of(straight), key=lambda line: line["mean_nll"])
    assert json.loads(printed)["domains"]["text"] == line["domains"]["text"]
    mhmoe_here("generate", best, "--prompt", "the", "--max-new-tokens", 2, *backend)
    said = mhmoe_here("train", "--resume", best_models_of(straight)[0], *backend, code=2).stderr
    assert "a model without the optimiser's state; start another run from it with --init" in said


def test_a_run_without_it_has_the_same_weights(straight: Path, tmp_path: Path) -> None:
    trainer = start_run(tmp_path / "run", configured(tmp_path, eval_every=0), backend="numpy")
    trainer.train()
    trainer.close()
    assert digests(tmp_path / "run") == digests(straight)
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    with pytest.raises(UserError, match=r"checkpoints/best: no such model; it is kept by"):
        find_checkpoint(tmp_path / "run" / "checkpoints" / "best")


def go_on(run: Path) -> None:
    trainer = resume_run(run, backend="numpy")
    trainer.train()
    finish_run(trainer)
    trainer.close()


def assert_same(run: Path, straight: Path) -> None:
    assert digests(run) == digests(straight)
    for name in ("validation.jsonl", "evaluation.json"):
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert [path.name for path in best_models_of(run)] == [
        path.name for path in best_models_of(straight)
    ]
    for path in best_models_of(straight):
        again = run / "checkpoints" / path.name / "model.safetensors"
        assert again.read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [4, 7])
def test_a_signal_breaks_a_validation_off_and_it_comes_first_when_the_run_goes_on(
    straight: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    trainer = start_run(run, configured(tmp_path), backend="numpy")

    def stop(doing: str, done: int, total: int) -> None:
        if trainer.step == step and doing.startswith("scoring"):
            signal.raise_signal(signal.SIGTERM)

    assert trainer.train(on_progress=stop) == signal.SIGTERM
    trainer.close()
    assert step_of(find_checkpoint(run)) == step
    assert [line["step"] for line in lines_of(run)] == [2, 4, 6][: step // 2 - (step == 4)]
    go_on(run)
    assert_same(run, straight)


def test_eval_of_a_run_scores_its_own_held_out_text(straight: Path, mhmoe_here: Run) -> None:
    printed = json.loads(mhmoe_here("eval", straight, "--json", "--backend", "numpy").stdout)
    assert printed == json.loads((straight / "evaluation.json").read_text())


def test_eval_needs_a_text_of_a_checkpoint_in_no_run(
    straight: Path, mhmoe_here: Run, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(checkpoints_of(straight)[-1], alone)
    refused = mhmoe_here("eval", alone, "--backend", "numpy", code=2)
    assert refused.stderr == (
        f"mhmoe-np: {alone}: is in no run folder; name a text with --domain NAME=PATH\n"
    )


def test_eval_sees_that_the_held_out_text_is_damaged(
    straight: Path, mhmoe_here: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    file = next((run / "validation").iterdir())
    file.write_bytes(file.read_bytes().replace(b"e", b"i", 1))
    refused = mhmoe_here("eval", run, "--backend", "numpy", code=2)
    assert f"{file}: damaged: its checksum is not that of" in refused.stderr


def test_eval_says_when_it_cannot_tell_which_text_is_held_out(
    straight: Path, mhmoe_here: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checksums.json").unlink()
    refused = mhmoe_here("eval", run, "--backend", "numpy", code=2)
    assert refused.stderr == (
        f"mhmoe-np: {run / 'checksums.json'}: missing, or without held-out text;"
        " name one with --domain NAME=PATH\n"
    )


def test_no_step_is_scored_twice(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scored = tmp_path / "run", []
    trainer = start_run(run, configured(tmp_path, steps=4), backend="numpy")
    trainer.train(on_validation=lambda report: scored.append(report.step))
    trainer.close()
    assert scored == [2, 4]
    trainer = resume_run(run, {"training": {"steps": 7}}, backend="numpy")
    trainer.train(on_validation=lambda report: scored.append(report.step))
    assert scored == [2, 4, 6, 7]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError

    trainer.close()
    trainer = resume_run(run, backend="numpy")
    monkeypatch.setattr(trainer.held_out, "scores", again)
    finish_run(trainer)
    trainer.close()
    assert_same(run, straight)


@pytest.mark.parametrize("after", [3, 4, 6])
def test_a_kill_between_two_checkpoints_loses_no_best_model(
    straight: Path, tmp_path: Path, after: int
) -> None:
    run = tmp_path / "run"
    trainer = start_run(run, configured(tmp_path, checkpoint_every=3), backend="numpy")

    class Killed(BaseException):
        """As if the process were gone: nothing is saved."""

    def kill(report: Any) -> None:
        if report.step == after:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(*(kill, None) if after == 3 else (None, None, kill))
    trainer.close()
    go_on(run)
    assert_same(run, straight)


def test_a_disk_that_is_full_at_the_best_model_loses_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer = start_run(run, configured(tmp_path), backend="numpy")
    with monkeypatch.context() as patch:

        def full(path: Path, _fill: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        patch.setattr(keeper, "write_directory_atomically", full)
        with pytest.raises(TrainingFailure, match=r"best-00000002: No space left on device"):
            trainer.train()
    trainer.close()
    assert best_models_of(run) == []
    go_on(run)
    assert_same(run, straight)


def test_a_best_model_that_was_lost_makes_way_for_the_next(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for path in best_models_of(run):
        shutil.rmtree(path)
    for path in checkpoints_of(run):
        if step_of(path) > 5:
            shutil.rmtree(path)
    trainer = Trainer(run, configured(tmp_path), load_operations("numpy"))
    trainer.train()
    trainer.close()
    again = min(lines_of(run)[2:], key=lambda line: line["mean_nll"])
    assert [step_of(path) for path in best_models_of(run)] == [again["step"]]


def test_a_damaged_line_is_passed_over(straight: Path, tmp_path: Path) -> None:
    whole = (straight / "validation.jsonl").read_text().splitlines()
    odd = ["{", '{"step": 4}', "[1]", '{"step": 5, "domains": {"a": 3}}', "[" * 100_000]
    (tmp_path / "validation.jsonl").write_text("\n".join([whole[0], *odd, whole[3]]))
    found = validation.Validation(tmp_path, every=2)
    assert [report.step for report in found.reports] == [2, 7]
    assert [report.as_dict() for report in found.reports] == [json.loads(whole[i]) for i in (0, 3)]


def test_the_command_says_what_a_validation_found(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=2)
    options = ("--data", "text.txt", "--out", "run", "--eval-every", 1, "--backend", "numpy")
    said = mhmoe_here("train", "config.toml", *options).stderr
    lines = [line for line in said.splitlines() if line.startswith("validation at step")]
    expected = [
        f"validation at step {line['step']}: mean NLL {line['mean_nll']:.4f}; "
        f"bits/byte: text {line['domains']['text']['bits_per_byte']:.4f}"
        for line in lines_of(tmp_path / "run")
    ]
    assert lines == expected
    assert len(lines) == 2
    said = mhmoe_here("train", "config.toml", *options, "--eval-every", -1, code=2).stderr
    assert "--eval-every or --set training.eval_every" in said
