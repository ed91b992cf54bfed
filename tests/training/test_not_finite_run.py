"""A number that is not finite ends a run before it spreads, and one goes on from what was good."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.checkpoints.checkpoint import checkpoints_of
from mhmoe_np.checkpoints.failure import load_failure
from mhmoe_np.checkpoints.training_state import load_training_checkpoint
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.run import RunConfig, merge, parse_run_config, read_toml
from mhmoe_np.training.keeper import TrainingFailure
from mhmoe_np.training.preparation import create_run_folder
from mhmoe_np.training.run import resume_run
from mhmoe_np.training.trainer import Trainer
from tests.resume import prepare

STEPS, EVERY = 6, 2
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
Plant = Callable[[Trainer, float], None]


def started(folder: Path, **model: Any) -> tuple[Path, RunConfig]:
    prepare(folder, steps=STEPS)
    tables = merge(
        read_toml(folder / "config.toml"),
        {"model": model, "data": {"paths": [str(folder / "text.txt")]}},
        {"training": {"checkpoint_every": EVERY}},
    )
    config = parse_run_config(tables, source="test")
    run = folder / "run"
    create_run_folder(run, config, threads=1, ops=load_operations("numba"))
    return run, config


def in_group(choose: Callable[[Trainer], Any]) -> Plant:
    def plant(trainer: Trainer, bad: float) -> None:
        choose(trainer).tensors[EXPERT][3, 1] = bad

    return plant


def in_the_embedding_of_a_rare_token(trainer: Trainer, bad: float) -> None:
    trainer.learner.parameters.tensors["model.embed_tokens.weight"][255, 0] = bad


def in_the_batch(trainer: Trainer, bad: float) -> None:
    batches = trainer._batches

    class Spoilt:
        def batch(self, step: int) -> Any:
            tokens = batches.batch(step)
            tokens[1, 2] = 2**31
            return tokens

    trainer._batches = cast(Any, Spoilt())


PLANTS: dict[str, tuple[Plant, str]] = {
    "weight": (in_group(lambda t: t.learner.parameters), f"weight {EXPERT}[3, 1] = "),
    "rare token": (in_the_embedding_of_a_rare_token, "weight model.embed_tokens.weight[255, 0] = "),
    "first moment": (in_group(lambda t: t.learner.moments.first), f"first moment of {EXPERT}[3, 1] = "),
    "second moment": (
        in_group(lambda t: t.learner.moments.second),
        f"second moment of {EXPERT}[3, 1] = ",
    ),
    "gradient": (in_group(lambda t: t.learner.gradient), f"gradient of {EXPERT}[3, 1] = "),
    "batch": (in_the_batch, "the batch holds token id 2147483648 at [1, 2]"),
}


def check_what_is_left(run: Path, config: RunConfig, failed_at: int) -> None:
    """The last good checkpoint is there, nothing newer, and a run with another rate goes on from it."""
    steps = [int(path.name[5:]) for path in checkpoints_of(run)]
    assert steps == list(range(EVERY, failed_at, EVERY))[-2:]
    for path in checkpoints_of(run):
        load_training_checkpoint(path, config)
    again = resume_run(run, {"optimizer": {"learning_rate": 1e-5}}, threads=1)
    assert again.step == (steps[-1] if steps else 0)
    assert any("optimizer.learning_rate is 1e-05" in notice for notice in again.notices)
    again.train()
    assert again.finished
    assert np.isfinite(again.learner.parameters.flat_P).all()


# A gradient that no update used yet is no part of what is saved; a token id is one or is not.
# Quantised weights are made in the update: the next forward sees nothing of what is planted after it.
CASES = [
    (quantization, where, at, bad)
    for quantization in ("none", "bitnet_b158")
    for where in PLANTS
    for at in (1, 2, 3, 4, STEPS)
    for bad in (math.nan, math.inf, -math.inf)
    if not (where == "gradient" and at in (2, 4, STEPS)) and not (where == "batch" and math.isinf(bad))
]


@pytest.mark.parametrize(("quantization", "where", "at", "bad"), CASES)
def test_what_is_planted_after_a_step_ends_the_run(
    tmp_path: Path, quantization: str, where: str, at: int, bad: float
) -> None:
    run, config = started(tmp_path, quantization=quantization)
    trainer = Trainer(run, config, load_operations("numba", threads=1, keep_buffers=True))
    plant, words = PLANTS[where]
    with pytest.raises(TrainingFailure) as caught:
        trainer.train(lambda report: plant(trainer, bad) if report.step == at else None)
    said = str(caught.value)
    assert words in said
    saving = at % EVERY == 0 or at == STEPS
    assert said.startswith(f"after step {at}" if saving and where != "batch" else f"step {at + 1}")
    assert "\n" not in said
    assert re.search(r"go on from .* with: mhmoe-np train --resume", said)
    if where in ("first moment", "second moment", "gradient"):
        assert np.isfinite(trainer.learner.parameters.flat_P).all()
    if where != "batch":
        failure = load_failure(run / "failure")
        assert failure.record.step == at + 1
        assert failure.record.fault is not None
        assert failure.record.fault in said
    trainer.close()
    check_what_is_left(run, config, at + (not saving))


class Spoiling:
    """Operations, of which one spoils its result in one step: once, or whenever it is repeated."""

    def __init__(self, ops: Operations, operation: str, call: int, *, once: bool) -> None:
        self._ops, self._operation, self._call, self._once = ops, operation, call, once
        self.armed, self._calls = False, 0

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name == "embedding":
            self._calls = 0
        if name != self._operation:
            return operation

        def spoilt(*arguments: Any, **options: Any) -> Any:
            result = operation(*arguments, **options)
            self._calls += 1
            if self.armed and self._calls == self._call:
                self.armed = not self._once
                first = result[0] if isinstance(result, tuple) else result
                first.reshape(-1)[5] = math.nan
            return result

        return spoilt


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    ("operation", "call", "words"),
    [
        ("rms_norm", 1, "layer 0, rms_norm of model.layers.0.input_layernorm.weight: y_ND[0, 5] = nan"),
        ("attention", 2, "layer 1, attention: "),
        ("expert_ffn", 1, "layer 1, expert_ffn of model.layers.1.mlp.experts: "),
        ("linear_backward", 1, "linear_backward of "),
    ],
)
def test_an_activation_that_is_not_finite_is_named(
    tmp_path: Path, operation: str, call: int, words: str, once: bool
) -> None:
    run, config = started(tmp_path)
    ops = load_operations("numba", threads=1, keep_buffers=True)
    spoiling = Spoiling(ops, operation, call, once=once)
    trainer = Trainer(run, config, cast(Operations, spoiling))

    def arm(report: Any) -> None:
        spoiling.armed = report.step == 3

    with pytest.raises(TrainingFailure) as caught:
        trainer.train(arm)
    said = str(caught.value)
    assert said.startswith("step 4: ")
    if once:
        assert "finite when it is repeated" in said
        assert re.search(r"layer 1, the router's logits|gradient of model\.", said)
    else:
        assert words in said
    before = trainer.learner.parameters.flat_P.copy()
    assert load_failure(run / "failure").parameters.flat_P.tobytes() == before.tobytes()
    trainer.close()
    check_what_is_left(run, config, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("operation", "which", "words"),
    [
        ("add_router_statistics", "first_choice_E", "a count of experts or weights"),
        ("add_router_statistics", "choice_E", "a count of experts or weights"),
        ("add_router_statistics", "p_E", "layer 1, the router's logits"),
        ("add_router_statistics", "dropped_E", "a count of experts or weights"),
        ("add_router_statistics", "squared_log_sum_exp_1", "layer 1, the router's logits"),
        ("add_sum_of_squares", "", "the gradient's norm|memory or the processor"),
        ("quantise_weight", "report_X5", "the scale of model.layers"),
    ],
)
@pytest.mark.parametrize("at", [3, 4])
def test_a_sum_that_is_not_finite_ends_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    which: str,
    words: str,
    at: int,
    bad: float,
) -> None:
    run, config = started(tmp_path, quantization="bitnet_b158")
    ops = load_operations("numba", threads=1, keep_buffers=True)
    trainer = Trainer(run, config, ops)
    plain = getattr(ops, operation)
    armed = []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        result = plain(*arguments, **options)
        if armed:
            armed.clear()
            target = options.get("report_X5", arguments[-1])
            target = getattr(target, which, target)
            target.reshape(-1)[0] = bad
        return result

    monkeypatch.setattr(ops, operation, spoilt)

    def arm(report: Any) -> None:
        if report.step == at:
            armed.append(True)

    with pytest.raises(TrainingFailure, match=words):
        trainer.train(arm)
    assert not trainer.learner.gradient.flat_P.any()
    monkeypatch.undo()
    trainer.close()
    for path in checkpoints_of(run):
        load_training_checkpoint(path, config)
    again = resume_run(run, {"optimizer": {"learning_rate": 1e-5}}, threads=1)
    again.train()
    assert again.finished


def test_an_update_that_overflows_is_not_saved(tmp_path: Path) -> None:
    run, config = started(tmp_path)
    trainer = resume_run(run, {"optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}, threads=1)
    trainer.learner.moments.second.tensors[EXPERT][...] = 0
    trainer.learner.moments.first.tensors[EXPERT][...] = 1e35
    with pytest.raises(
        TrainingFailure, match=re.escape(f"step 1: not finite: AdamW's update of {EXPERT}")
    ):
        trainer.train()
    trainer.close()
    check_what_is_left(run, config, 0)


@pytest.mark.parametrize("every", [1, 4])
def test_weights_that_no_step_can_follow_are_not_saved(tmp_path: Path, every: int) -> None:
    run, config = started(tmp_path)
    over = {
        "optimizer": {"learning_rate": 1e18, "warmup_steps": 0},
        "training": {"checkpoint_every": every},
    }
    trainer = resume_run(run, over, threads=1)
    with pytest.raises(TrainingFailure, match="layer 0"):
        trainer.train()
    assert checkpoints_of(run) == []
    trainer.close()
    check_what_is_left(run, config, 0)
