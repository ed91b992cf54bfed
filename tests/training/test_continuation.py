"""Which folder a run goes into, and what may change when it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from mhmoe_np.checkpoints.training_state import Change, TrainerState, TrainingCheckpoint
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.run import Layer, RunConfig, merge, parse_run_config, read_toml
from mhmoe_np.storage.lock import lock_folder
from mhmoe_np.training.continuation import (
    changes,
    folder_to_resume,
    fresh_folder,
    open_run,
    resumed_config,
)
from mhmoe_np.training.preparation import create_run_folder
from mhmoe_np.training.run import resume_run
from tests.resume import prepare


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(name: str, *checkpoints: str) -> Path:
    run = Path("runs") / name
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    for checkpoint in checkpoints:
        (run / "checkpoints" / checkpoint).mkdir(parents=True)
    return run


def test_a_fresh_folder_has_the_next_number() -> None:
    assert fresh_folder("a") == Path("runs/a")
    make_run("a")
    assert fresh_folder("a") == Path("runs/a-2")
    make_run("a-7"), make_run("a-b"), make_run("ab-9")
    assert fresh_folder("a") == Path("runs/a-8")


def test_auto_means_the_last_run_of_that_name() -> None:
    assert folder_to_resume("auto", None, "a") is None
    make_run("a"), make_run("a-2"), make_run("a-10")
    assert folder_to_resume("auto", None, "a") == Path("runs/a-10")
    assert folder_to_resume("auto", Path("runs/a-2"), "a") == Path("runs/a-2")
    assert folder_to_resume("auto", Path("elsewhere"), "a") is None


def test_a_run_is_named_by_itself_or_by_its_last_checkpoint() -> None:
    run = make_run("a", "step-00000003", "step-00000006")
    assert folder_to_resume("runs/a", None, "x") == run
    assert folder_to_resume("runs/a", Path("runs/b/../a"), "x") == run
    assert folder_to_resume("runs/a/checkpoints/step-00000006", None, "x") == run
    with pytest.raises(UserError, match="not the last checkpoint of runs/a"):
        folder_to_resume("runs/a/checkpoints/step-00000003", None, "x")
    with pytest.raises(UserError, match="--out runs/b: a resumed run stays in its folder runs/a"):
        folder_to_resume("runs/a", Path("runs/b"), "x")
    with pytest.raises(UserError, match="not a run folder, nor a checkpoint in one"):
        folder_to_resume("runs", None, "x")


def started(folder: Path) -> tuple[Path, RunConfig]:
    prepare(folder, steps=10)
    tables = read_toml(Path("config.toml")) | {"data": {"paths": ["text.txt"]}}
    config = parse_run_config(tables, source="config.toml")
    create_run_folder(Path("run"), config, threads=1, ops=load_operations("numpy"))
    return Path("run"), config


def test_the_configuration_of_a_run_reads_back_as_it_was(folder: Path) -> None:
    run, config = started(folder)
    assert resumed_config(open_run(run), {}) == config


def test_a_library_of_products_that_is_another_one_is_noted(folder: Path) -> None:
    run, config = started(folder)
    opened, ops = open_run(run), load_operations("numpy")
    blas = ops.blas()
    assert blas is not None

    def noted(before: str | None) -> list[Change]:
        state = TrainerState(step=3, config=config, backend="numpy", blas=before)
        parameters = Parameters(config.model, np.float32)
        moments = Moments.zeros(config.model, np.float32)
        checkpoint = TrainingCheckpoint(parameters, moments, state)
        return changes(opened._replace(checkpoint=checkpoint), config, ops)

    assert noted(None) == noted(blas.name) == []  # None: of an older release, or of a GPU
    assert noted("mkl") == [Change(step=3, key="the BLAS", before="mkl", now=blas.name)]


def test_what_shapes_batches_and_weights_may_not_change(folder: Path) -> None:
    run, config = started(folder)
    opened = open_run(run)
    longer = resumed_config(opened, {"training": {"steps": 20, "log_every": 1}})
    assert (longer.training.steps, longer.training.log_every) == (20, 1)
    assert longer.identity() == config.identity()
    ops = load_operations("numpy")
    assert changes(opened, longer, ops) == []
    lower = resumed_config(opened, {"optimizer": {"learning_rate": 1e-5}})
    key = "optimizer.learning_rate"
    assert changes(opened, lower, ops) == [Change(step=0, key=key, before=6e-4, now=1e-5)]
    with pytest.raises(UserError, match=r"run: was started with training.seed = 0, now 1 is given"):
        resumed_config(opened, {"training": {"seed": 1}})
    base = [Layer(read_toml(Path("config.toml")), "config.toml")]
    with pytest.raises(UserError, match=r"data.paths = \['text.txt'\], now \[\] is given"):
        resumed_config(opened, {}, base=base)


def test_a_run_has_one_writer(folder: Path) -> None:
    run, _ = started(folder)
    opened = open_run(run)
    with pytest.raises(UserError, match="run: another process is writing there"):
        open_run(run)
    opened.lock.release()
    opened = open_run(run)
    del opened
    open_run(run)


def test_a_name_that_is_just_being_made_is_not_free(folder: Path) -> None:
    temporary = Path("runs/.tmp-a")
    temporary.mkdir(parents=True)
    assert fresh_folder("a") == Path("runs/a")
    lock = lock_folder(temporary)
    assert fresh_folder("a") == Path("runs/a-2")
    lock.release()
    assert fresh_folder("a") == Path("runs/a")


@pytest.mark.parametrize(
    "name",
    ["config.toml", "environment.json", "tokenizer.json", "data/text-00000.bin", "data/store.json"],
)
def test_damage_to_what_a_run_was_made_with_is_found_at_the_start(folder: Path, name: str) -> None:
    run, _ = started(folder)
    content = bytearray((run / name).read_bytes())
    content[len(content) // 3] ^= 16
    (run / name).write_bytes(content)
    with pytest.raises(Damaged, match=f"{name}: damaged"):
        open_run(run)


def test_a_refusal_leaves_nothing_behind(folder: Path) -> None:
    prepare(folder, steps=10)
    before = sorted(Path().iterdir())
    tables = read_toml(Path("config.toml")) | {"data": {"paths": ["text.txt"]}}
    too_long = merge(tables, {"training": {"sequence_length": 100_000, "batch_size": 1}})
    config = parse_run_config(too_long, source="config.toml")
    with pytest.raises(UserError, match="lower sequence_length or add text"):
        create_run_folder(Path("runs/new/run"), config, threads=1, ops=load_operations("numpy"))
    assert sorted(Path().iterdir()) == before


def test_memory_that_does_not_suffice_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is asked for before a checkpoint is loaded, whose arrays are a part of it."""
    run, _ = started(folder)
    trainer = resume_run(run, backend="numpy", threads=1)
    trainer.train()
    trainer.close()
    saved = sorted((run / "checkpoints").iterdir())
    memory, needed = psutil.virtual_memory(), 4 * trainer.learner.parameters.flat_P.nbytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed // 2))
    with pytest.raises(UserError, match="parameters, with gradient and two moments") as caught:
        open_run(run)
    assert "whole" not in str(caught.value)
    assert sorted((run / "checkpoints").iterdir()) == saved
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * needed))
    open_run(run)
