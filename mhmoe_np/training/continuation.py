"""Which run folder a run goes into, and from which checkpoint and with which settings it goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mhmoe_np.checkpoints.checkpoint import BEST, CHECKPOINTS, checkpoints_of
from mhmoe_np.checkpoints.training_state import (
    Change,
    TrainingCheckpoint,
    load_training_checkpoint,
)
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.model.room import check_batch_room, check_room
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.run import (
    COMMAND_LINE,
    FREE_KEYS,
    Layer,
    RunConfig,
    Tables,
    differences,
    may_change,
    parse_run_config,
    resolve,
)
from mhmoe_np.storage.checksums import CHECKSUMS, seal_in_place, verify
from mhmoe_np.storage.files import remove_directory, remove_leftovers, temporary_of
from mhmoe_np.storage.lock import Lock, is_locked, lock_folder
from mhmoe_np.storage.reading import read_json
from mhmoe_np.training.run_folder import (
    ENVIRONMENT,
    RUN_CONFIG,
    SET_ASIDE,
    is_run_folder,
    prepared_files,
    read_run_tables,
)

RUNS = Path("runs")  # where a run goes that was told no folder


def fresh_folder(name: str) -> Path:
    """runs/NAME, or the next free of runs/NAME-2, runs/NAME-3, ...; one being made is not free."""
    numbers = _numbers(name)
    number = max(numbers) + 1 if numbers else 1
    while is_locked(temporary_of(_numbered(name, number))):
        number += 1
    return _numbered(name, number)


def folder_to_resume(resume: str, out: Path | None, name: str) -> Path | None:
    """The run folder that `--resume` means, or None: there is none yet, start a new run.

    resume: a run folder, the last checkpoint in one, or `auto`: `out` if it was given, else the last
    of runs/NAME, runs/NAME-2, ...
    Raises UserError: a path that is neither, or `out` is another folder than it.
    """
    if resume == "auto":
        run = out or _numbered(name, max(_numbers(name), default=1))
        return run if is_run_folder(run) else None
    path = Path(resume)
    run = path.parent.parent if path.resolve().parent.name == CHECKPOINTS else path
    if not is_run_folder(run):
        raise UserError(f"--resume {resume}: not a run folder, nor a checkpoint in one")
    if run != path and path.name.startswith(BEST):
        raise UserError(
            f"--resume {resume}: is a model without the optimiser's state; start another run from it "
            "with --init"
        )
    if run != path and path.resolve() not in checkpoints_of(run.resolve())[-1:]:
        raise UserError(
            f"--resume {resume}: not the last checkpoint of {run}; remove the later ones to go on "
            "from here"
        )
    if out is not None and out.resolve() != run.resolve():
        raise UserError(f"--out {out}: a resumed run stays in its folder {run}; leave --out away")
    return run


def _numbers(name: str) -> list[int]:
    """The n of each runs/NAME-n there is; runs/NAME is 1."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    matches = [pattern.fullmatch(path.name) for path in RUNS.glob("*")]
    return [int(match[1] or 1) for match in matches if match]


def _numbered(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")


class OpenRun(NamedTuple):
    """A run folder that is ours to write to.

    Attributes:
        started_with: the configuration that its `config.toml` holds.
        checkpoint: where it stands; None: no checkpoint was written yet.
        notices: what its owner should know, a line each.
    """

    run: Path
    lock: Lock
    started_with: RunConfig
    checkpoint: TrainingCheckpoint | None
    notices: list[str]

    @property
    def config(self) -> RunConfig:
        """As the run stands now."""
        return self.checkpoint.state.config if self.checkpoint else self.started_with


def check_training_room(config: RunConfig) -> None:
    """Refuse a run that the free memory cannot hold, before any of it is written or loaded.

    Raises UserError: see `mhmoe_np.model.room`.
    """
    training = config.training
    sequences = training.batch_size // training.gradient_accumulation_steps
    check_room(config.model, copies=4, source="model")
    tokens = sequences * training.sequence_length
    check_batch_room(config.model, tokens=tokens, source="training.batch_size")


def open_run(run: Path, *, lock: Lock | None = None, on_progress: OnProgress = unseen) -> OpenRun:
    """Lock a run folder, look at every byte that is in it, and load its newest whole checkpoint.

    lock: of the folder, where it is held already.
    on_progress: counts the bytes of each file.
    A checkpoint that is damaged is set aside under another name.

    Raises UserError: it is in use, a file that it was made with is missing or damaged, the free memory
    cannot hold it, or there are checkpoints and none of them is whole.
    """
    lock = lock or lock_folder(run)
    try:
        return _opened(run, lock, on_progress)
    except BaseException:
        lock.release()  # a traceback that is kept, as in a notebook, would keep it too
        raise


def _opened(run: Path, lock: Lock, on_progress: OnProgress) -> OpenRun:
    notices = []
    if not verify(run, on_progress):  # of an older release, or somebody removed them
        seal_in_place(run, prepared_files(run))
        notices.append(f"{run / CHECKSUMS}: made anew, of the files as they are: there was none")
    remove_leftovers(run)
    started_with = parse_run_config(read_run_tables(run), source=str(run / RUN_CONFIG))
    check_training_room(started_with)  # what it looks at may not change when a run is resumed
    if (run / CHECKPOINTS).is_dir():
        remove_leftovers(run / CHECKPOINTS)
    checkpoint, more = _newest_whole_checkpoint(run, started_with, on_progress)
    if checkpoint is None and (init := read_json(run / ENVIRONMENT).get("init")):
        raise UserError(
            f"{run}: was started with --init {init} and its checkpoints are gone; put one back, or "
            "start another run with --init"
        )
    return OpenRun(run, lock, started_with, checkpoint, notices + more)


def _newest_whole_checkpoint(
    run: Path, started_with: RunConfig, on_progress: OnProgress
) -> tuple[TrainingCheckpoint | None, list[str]]:
    newest: tuple[Path, TrainingCheckpoint] | None = None
    damaged: list[tuple[Path, UserError]] = []
    for path in reversed(checkpoints_of(run)):
        try:
            if newest is None:
                newest = path, load_training_checkpoint(path, started_with, on_progress)
            else:
                verify(path, on_progress)
        except UserError as error:
            damaged.append((path, error))
    if newest is None:
        if damaged:
            raise Damaged(
                f"{damaged[0][1]}; no checkpoint of {run} is whole: put a copy back (or, to start "
                f"again from step 0, remove its folder {CHECKPOINTS})"
            )
        return None, []
    path, checkpoint = newest
    notices = []
    for other, fault in damaged:
        aside = other.with_name(SET_ASIDE + other.name)
        if aside.exists():
            remove_directory(aside)
        other.rename(aside)
        notices.append(f"{fault}; set aside as {aside.name}, going on from {path.name}")
    return checkpoint, notices


def resumed_config(opened: OpenRun, over: Tables, *, base: Sequence[Layer] | None = None) -> RunConfig:
    """The configuration that a run goes on with: `over` laid over the one that it has.

    base: what the run was started with, where that was given again. What it says as it said then is
    no wish to take back what was changed since.
    Raises UserError: a key is unfit, or differs that would make it another run (see `may_change`).
    """
    before, top = opened.config, Layer(over, COMMAND_LINE)
    layers = [Layer(before.model_dump(), str(opened.run))]
    if base is not None:
        new = differences(opened.started_with, resolve([*base, top]))
        layers = [*base, Layer(_without(before.model_dump(), new), str(opened.run))]
    now = resolve([*layers, top])
    for key, (old, new) in differences(before, now).items():
        if not may_change(key):
            raise UserError(
                f"{opened.run}: was started with {key} = {old!r}, now {new!r} is given; start another "
                "run with another --out (--init takes the weights of this one over)"
            )
    return now


def _without(tables: Tables, keys: Iterable[str]) -> Tables:
    dropped = set(keys)
    return {
        table: {key: value for key, value in values.items() if f"{table}.{key}" not in dropped}
        for table, values in tables.items()
    }


def changes(opened: OpenRun, now: RunConfig, ops: Operations) -> list[Change]:
    """The settings that another sitting changes, the backend and its BLAS, for the run's own record."""
    state = opened.checkpoint.state if opened.checkpoint else None
    step = state.step if state else 0
    found = [
        Change(step=step, key=key, before=old, now=new)
        for key, (old, new) in differences(opened.config, now).items()
        if key not in FREE_KEYS
    ]
    if state is not None:
        blas = ops.blas()
        for key, before, after in (
            ("the backend", state.backend, ops.name),
            ("the BLAS", state.blas, blas and blas.name),
        ):
            if before is not None and after not in (None, before):
                found.append(Change(step=step, key=key, before=before, now=after))
    return found
