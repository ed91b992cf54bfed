"""Being stopped: nothing is lost but what the message says."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from mhmoe_np.checkpoints.checkpoint import checkpoints_of
from mhmoe_np.errors import Interrupted
from mhmoe_np.storage import files
from tests.conftest import Run
from tests.resume import MAIN, command, digests, prepare, straight

STEPS = 4000


def start(folder: Path, *options: str, out: str = "run", **streams: object) -> subprocess.Popen[str]:
    """A run by the definition's backend, which starts in a third of the time."""
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, **streams}
    arguments = [*command(folder, out), "--backend", "numpy", *options]
    return subprocess.Popen(arguments, text=True, **streams)  # type: ignore[call-overload]


def steps_made(folder: Path, out: str = "run") -> int:
    metrics = folder / out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def saved_steps(folder: Path, out: str = "run") -> list[int]:
    return [int(path.name[5:]) for path in checkpoints_of(folder / out)]


@pytest.mark.parametrize("kind", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_so_at_once(tmp_path: Path, kind: signal.Signals) -> None:
    prepare(tmp_path, steps=STEPS)
    process = start(tmp_path, "--checkpoint-every", "100000")
    wait(process, lambda: steps_made(tmp_path) > 10)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert f"{kind.name}: this step is finished and saved, then the run stops; once more" in said
    assert saved_steps(tmp_path) == [steps_made(tmp_path)]
    assert f"stopped at step {steps_made(tmp_path)}, saved" in said


def test_a_second_signal_stops_at_once_and_says_what_is_lost(tmp_path: Path) -> None:
    prepare(tmp_path, steps=STEPS)
    # Large steps: the second signal comes in the middle of one.
    options = ("--set", "batch_size=16", "--set", "sequence_length=512", "--checkpoint-every", "2")
    process = start(tmp_path, *options)
    wait(process, lambda: steps_made(tmp_path) == 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at once: step 3 is lost; go on from the checkpoint of step 2" in said
    assert saved_steps(tmp_path) == [2]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    prepare(tmp_path, steps=60)
    process = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait(process, lambda: steps_made(tmp_path) > 1)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def in_preparation(folder: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A run of a text so long that it is still being prepared, and what was in the folder before."""
    prepare(folder, steps=10)
    text = (folder / "text.txt").read_text()
    (folder / "text.txt").write_text("".join(f"{text} {i}" for i in range(100)))
    before = sorted(folder.iterdir())
    process = start(folder, out="runs/run")
    wait(process, lambda: (folder / "runs" / ".tmp-run").exists())
    return process, before


@pytest.mark.parametrize("kind", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_preparation_leaves_nothing_behind(
    tmp_path: Path, kind: signal.Signals
) -> None:
    process, before = in_preparation(tmp_path)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert said.count("mhmoe-np: ") == 1
    assert "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_signal_before_the_folder_is_locked_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path) -> NoReturn:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(files, "lock_folder", interrupted)
    with pytest.raises(Interrupted):
        files.write_directory_atomically(tmp_path / "runs" / "run", lambda folder: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kinds", [(signal.SIGINT,) * 2, (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
)
def test_more_signals_on_the_way_out_change_nothing(
    tmp_path: Path, kinds: tuple[signal.Signals, ...]
) -> None:
    process, before = in_preparation(tmp_path)
    for kind in kinds:
        process.send_signal(kind)
        time.sleep(0.003)
    _, said = process.communicate(timeout=60)
    # At its very end the interpreter gives signals back to the system; a shell sees the same code.
    assert process.returncode in {code for kind in kinds for code in (128 + kind, -kind)}
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_starts_without_a_name_of_their_own_all_run(tmp_path: Path) -> None:
    prepare(tmp_path, steps=3)
    arguments = [*MAIN, "train", "config.toml", "--data", "text.txt", "--backend", "numpy"]
    processes = [
        subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0, 0]
    names = ["config", "config-2", "config-3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_a_log_reader_that_goes_away_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    prepare(tmp_path, steps=STEPS)
    process = start(tmp_path, "--checkpoint-every", "100000", "--set", "log_every=1")
    assert process.stderr is not None
    while "step 5/" not in process.stderr.readline():
        pass
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert saved_steps(tmp_path) == [steps_made(tmp_path)]
    again = start(tmp_path, "--steps", str(steps_made(tmp_path) + 3))
    again.communicate(timeout=60)
    assert again.returncode == 0


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    prepare(tmp_path, steps=STEPS)
    ours, theirs = pty.openpty()

    def take_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(
        tmp_path,
        *("--checkpoint-every", "100000"),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        preexec_fn=take_the_terminal,
    )
    os.close(theirs)
    wait(process, lambda: steps_made(tmp_path) > 20)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert saved_steps(tmp_path) == [steps_made(tmp_path)]


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    prepare(tmp_path, steps=20)
    # A log that may not grow, as one on a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    arguments = command(tmp_path, "run")
    arguments[2] = f"{limit}{arguments[2]}"
    with (tmp_path / "log").open("wb") as log:
        log.truncate(1 << 20)
        log.seek(1 << 20)
        done = subprocess.run(arguments, stderr=log, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0
    assert "sample:" in done.stdout
    assert (tmp_path / "log").stat().st_size == 1 << 20


def test_of_two_starts_at_once_one_runs_and_one_is_told(tmp_path: Path) -> None:
    prepare(tmp_path, steps=40)
    start(tmp_path, out="straight").communicate(timeout=120)
    expected = digests(tmp_path / "straight")
    for attempt in range(3):
        name = f"run-{attempt}"
        pair = [start(tmp_path, out=name) for _ in range(2)]
        said = [process.communicate(timeout=120)[1] for process in pair]
        codes = [process.returncode for process in pair]
        # The second may also come after the first has ended, and then finds nothing left to do.
        for code, words in zip(codes, said, strict=True):
            assert code in (0, 2)
            assert code == 0 or re.search("another process is|exists already", words)
        assert 0 in codes
        assert digests(tmp_path / name) == expected
        lines = [
            json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(1, 41))


def test_a_second_run_in_a_folder_in_use_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    prepare(tmp_path, steps=STEPS)
    process = start(tmp_path)
    wait(process, lambda: steps_made(tmp_path) > 5)
    second = subprocess.run(command(tmp_path, "run"), capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "run: another process is writing there" in second.stderr
    before = steps_made(tmp_path)
    wait(process, lambda: steps_made(tmp_path) > before)
    process.kill()
    process.communicate()
    # The lock died with its owner.
    third = start(tmp_path)
    wait(third, lambda: steps_made(tmp_path) > before + 5)
    third.kill()
    third.communicate()


# ---- damage ----------------------------------------------------------------------------------------


def flip(path: Path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << (bit % 8)
    path.write_bytes(content)


def test_resume_falls_back_to_the_newest_whole_checkpoint(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=12)
    expected, _ = straight(tmp_path)
    options = ("--set", "keep_checkpoints=9")
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run", *options)
    checkpoints = tmp_path / "run" / "checkpoints"
    flip(checkpoints / "step-00000012" / "model.safetensors")
    flip(checkpoints / "step-00000009" / "optimizer.safetensors")
    named = mhmoe_here("eval", "run", "--domain", "x=text.txt", code=2)
    assert "step-00000012/model.safetensors: damaged" in named.stderr
    chosen = mhmoe_here("train", "--resume", checkpoints / "step-00000009", code=2)
    assert "not the last checkpoint" in chosen.stderr
    again = mhmoe_here("train", "--resume", "run")
    lines = again.stderr.splitlines()
    assert "step-00000012/model.safetensors: damaged" in lines[0]
    assert "set aside as damaged-step-00000012, going on from step-00000006" in lines[0]
    assert "step-00000009/optimizer.safetensors: damaged" in lines[1]
    assert "the 6 steps that metrics.jsonl has after step 6 are made again" in lines[2]
    assert "continuing at step 6" in lines[3]
    assert digests(tmp_path / "run") == expected
    assert sorted(path.name for path in checkpoints.glob("damaged-*")) == [
        "damaged-step-00000009",
        "damaged-step-00000012",
    ]


def test_without_a_whole_checkpoint_nothing_is_started_silently(
    mhmoe_here: Run, tmp_path: Path
) -> None:
    prepare(tmp_path, steps=6)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    for checkpoint in checkpoints_of(tmp_path / "run"):
        flip(checkpoint / "model.safetensors")
    refused = mhmoe_here("train", "--resume", "run", "--steps", 9, code=2)
    assert "no checkpoint of run is whole: put a copy back (or, to start again from" in refused.stderr
    assert saved_steps(tmp_path) == [3, 6]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    mhmoe_here("train", "--resume", "run")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000 + b"\n", None])
def test_a_damaged_log_is_told_of_and_kept(
    mhmoe_here: Run, tmp_path: Path, content: bytes | None
) -> None:
    prepare(tmp_path, steps=6)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    if content is None:
        flip(metrics)
        kept = metrics.read_bytes()
    else:
        kept = content[: metrics.stat().st_size]
        metrics.write_bytes(content)
    again = mhmoe_here("train", "--resume", "run", "--steps", 8)
    assert "metrics.jsonl: damaged: not as it was written; what is left of it is kept" in again.stderr
    lines = metrics.read_bytes()
    assert lines.startswith(kept)
    new = [line for line in lines[len(kept) :].splitlines() if line]
    assert [json.loads(line)["step"] for line in new] == [7, 8]
    quiet = mhmoe_here("train", "--resume", "run", "--steps", 9)
    assert "damaged" not in quiet.stderr


def test_evaluation_is_made_again_where_it_is_not_whole(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=3)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    assert "is finished" in mhmoe_here("train", "--resume", "run").stderr
    flip(tmp_path / "run" / "evaluation.json")
    assert "evaluation.json: damaged" in mhmoe_here("train", "--resume", "run", code=2).stderr
    os.remove(tmp_path / "run" / "checksums.json")
    again = mhmoe_here("train", "--resume", "run")
    assert "checksums.json: made anew, of the files as they are: there was none" in again.stderr
    assert "bits/byte" in again.stdout
    assert "is finished" in mhmoe_here("train", "--resume", "run").stderr
    flip(tmp_path / "run" / "data" / "text-00000.bin")
    assert "text-00000.bin: damaged" in mhmoe_here("train", "--resume", "run", code=2).stderr


def test_only_the_text_that_was_held_out_is_scored(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=3)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    (tmp_path / "run" / "validation" / "other.jsonl").write_text('{"text": "the whale a ship"}\n')
    (tmp_path / "run" / "validation" / "bad.jsonl").write_text("no JSON")
    mhmoe_here("train", "--resume", "run", "--steps", 4)
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["domains"]
    assert list(scores) == ["text"]


def test_the_first_command_again_keeps_what_was_changed_since(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=4)
    first = ("train", "config.toml", "--data", "text.txt", "--out", "run", "--resume", "auto")
    mhmoe_here(*first)
    mhmoe_here("train", "--resume", "run", "--steps", 6, "--set", "learning_rate=1e-4")
    again = mhmoe_here(*first)
    assert "is finished: 6 steps were made" in again.stderr
    further = mhmoe_here(*first, "--steps", 7)
    assert "learning_rate" not in further.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 7
    assert last["learning_rate"] < 1e-4
    back = mhmoe_here(*first, "--steps", 8, "--set", "learning_rate=6e-4")
    assert "from step 7 on optimizer.learning_rate is 0.0006; it was 0.0001" in back.stderr


def test_checkpoints_that_are_links_or_files_do_not_stop_a_run(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=6)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    elsewhere = shutil.move(checkpoints / "step-00000003", tmp_path / "elsewhere")
    (checkpoints / "step-00000003").symlink_to(elsewhere)
    (checkpoints / "step-00000009").write_text("no folder")
    (tmp_path / "run" / "failure").write_text("no folder")
    mhmoe_here("train", "--resume", "run", "--steps", 12)
    assert saved_steps(tmp_path) == [9, 12]
    assert (tmp_path / "elsewhere").is_dir()


def test_a_log_that_is_a_pipe_is_refused(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=3)
    mhmoe_here("train", "config.toml", "--data", "text.txt", "--out", "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    refused = mhmoe_here("train", "--resume", "run", "--steps", 4, code=2)
    assert "metrics.jsonl: is a pipe; give a file" in refused.stderr
