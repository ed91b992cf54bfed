"""Which folder a run goes into, and what may change when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhmoe_np.errors import UserError
from mhmoe_np.settings.run import RunConfig, parse_run_config, read_toml
from mhmoe_np.training.continuation import folder_to_resume, fresh_folder, resumed_config
from mhmoe_np.training.preparation import create_run_folder
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
    create_run_folder(Path("run"), config, threads=1, backend="numpy")
    return Path("run"), config


def test_the_configuration_of_a_run_reads_back_as_it_was(folder: Path) -> None:
    run, config = started(folder)
    assert resumed_config(run, {}) == config


def test_steps_may_change_and_what_shapes_the_weights_may_not(folder: Path) -> None:
    run, config = started(folder)
    longer = resumed_config(run, {"training": {"steps": 20, "log_every": 1}})
    assert (longer.training.steps, longer.training.log_every) == (20, 1)
    assert longer.identity() == config.identity()
    with pytest.raises(UserError, match=r"run: was started with optimizer.learning_rate = 0.0006, now"):
        resumed_config(run, {"optimizer": {"learning_rate": 0.5}})
    with pytest.raises(UserError, match=r"data.paths = \['text.txt'\], now \[\] is given"):
        resumed_config(run, {}, base=read_toml(Path("config.toml")))
