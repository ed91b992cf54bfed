"""A disk that fills up costs a run no more than its message says."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mhmoe_np.checkpoints.checkpoint import checkpoints_of
from mhmoe_np.settings.run import merge, parse_run_config, read_toml
from mhmoe_np.training import keeper
from mhmoe_np.training.keeper import TrainingFailure
from mhmoe_np.training.log_file import LogFile
from mhmoe_np.training.run import resume_run, start_run
from mhmoe_np.training.trainer import Trainer
from tests import full_disk
from tests.resume import digests, prepare, straight


@pytest.mark.skipif(not full_disk.can_mount(), reason="this machine lets nobody mount a small disk")
def test_wherever_the_disk_fills_up_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    prepare(tmp_path, full_disk.STEPS)
    expected, _ = straight(tmp_path)
    for room in (40_000, 330_000, 560_000, 800_000, 1_200_000):
        _, found = full_disk.trial(tmp_path, room, [])
        assert found == expected


def started(folder: Path, **training: Any) -> Trainer:
    prepare(folder, steps=9)
    tables = merge(
        read_toml(folder / "config.toml"),
        {"data": {"paths": [str(folder / "text.txt")]}, "training": training},
    )
    config = parse_run_config(tables, source="test")
    return start_run(folder / "run", config, backend="numpy", threads=1)


class Disk:
    """No room from the moment it is full on, until so many checkpoints were removed."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, removals: int, code: int = errno.ENOSPC
    ) -> None:
        self.is_full, self._removals, self._code = False, removals, code
        self._write, self._save = LogFile.write, keeper.save_training_checkpoint
        remove = keeper.remove_directory

        def removed(path: Path) -> None:
            remove(path)
            self._removals -= self.is_full

        def write(log: LogFile, value: dict[str, Any]) -> None:
            self.check()
            self._write(log, value)

        def save(*arguments: Any) -> None:
            self.check()
            self._save(*arguments)

        monkeypatch.setattr(LogFile, "write", write)
        monkeypatch.setattr(keeper, "save_training_checkpoint", save)
        monkeypatch.setattr(keeper, "remove_directory", removed)

    def fills_after_step_7(self, report: Any) -> None:
        self.is_full |= report.step == 7

    def check(self) -> None:
        if self.is_full and self._removals > 0:
            raise OSError(self._code, os.strerror(self._code), "a file")


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints_of(run)]


def test_a_line_without_room_saves_the_step_where_an_older_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, disk = started(tmp_path), Disk(monkeypatch, removals=1)

    with pytest.raises(TrainingFailure, match="step 8 is saved in the place of an older checkpoint"):
        trainer.train(disk.fills_after_step_7)
    assert steps(trainer.run) == [6, 8]
    assert (trainer.run / "metrics.jsonl").read_text().count("\n") == 8
    trainer.close()
    disk.is_full = False
    again = resume_run(trainer.run, backend="numpy", threads=1)
    assert again.step == 8
    again.train()
    other = tmp_path / "other"
    other.mkdir()
    undisturbed = started(other)
    undisturbed.train()
    assert digests(again.run) == digests(undisturbed.run)


@pytest.mark.parametrize(
    ("removals", "code", "left"),
    [(9, errno.ENOSPC, [6]), (9, errno.EDQUOT, [6]), (1, errno.EIO, [3, 6])],
)
def test_without_room_for_another_one_the_newest_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removals: int, code: int, left: list[int]
) -> None:
    trainer, disk = started(tmp_path), Disk(monkeypatch, removals, code)

    words = r"a file: .*; steps 7 to 8 are lost; go on from the checkpoint of step 6 with"
    with pytest.raises(TrainingFailure, match=words):
        trainer.train(disk.fills_after_step_7)
    assert steps(trainer.run) == left


def test_weights_that_no_step_can_follow_take_no_good_checkpoint_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, disk = started(tmp_path), Disk(monkeypatch, removals=1)

    def fill(report: Any) -> None:
        disk.fills_after_step_7(report)
        if report.step == 8:
            trainer.learner.parameters.tensors["model.norm.weight"][0] = float("nan")

    with pytest.raises(TrainingFailure, match=r"after step 8: not finite: weight model\.norm"):
        trainer.train(fill)
    assert steps(trainer.run) == [3, 6]


def test_nothing_is_removed_where_that_would_not_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, disk = started(tmp_path), Disk(monkeypatch, removals=1)
    no_room = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: no_room)
    (trainer.run / "checkpoints").mkdir(exist_ok=True)

    def fill(report: Any) -> None:
        disk.fills_after_step_7(report)
        if report.step == 7:  # an older checkpoint that is hardly there
            (trainer.run / "checkpoints" / "step-00000003" / "optimizer.safetensors").write_bytes(b"")

    with pytest.raises(TrainingFailure, match="steps 7 to 8 are lost"):
        trainer.train(fill)
    assert steps(trainer.run) == [3, 6]


def test_a_set_aside_checkpoint_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, disk = started(tmp_path), Disk(monkeypatch, removals=1)
    aside = trainer.run / "checkpoints" / "damaged-step-00000003"
    aside.mkdir()

    with pytest.raises(TrainingFailure, match="nothing is lost"):
        trainer.train(disk.fills_after_step_7)
    assert steps(trainer.run) == [3, 6, 8]
    assert not aside.exists()


def test_a_torn_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path / "log.jsonl", keeper.BEGINNING)
    log.write({"step": 1})
    before, mark = (tmp_path / "log.jsonl").read_bytes(), log.mark
    write, calls = os.write, []

    def torn(descriptor: int, line: bytes) -> int:
        calls.append(line)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, line[:5])

    monkeypatch.setattr(os, "write", torn)
    with pytest.raises(OSError, match="No space left on device"):
        log.write({"step": 2})
    monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert log.mark == mark
    log.write({"step": 3})
    assert LogFile(tmp_path / "log.jsonl", log.mark).notice is None
