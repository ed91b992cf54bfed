"""What a run keeps: its logs and its checkpoints, as much of both as the disk has room for."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import (
    BEST,
    CHECKPOINTS,
    best_models_of,
    checkpoints_of,
    save_model,
    step_of,
)
from mhmoe_np.checkpoints.training_state import (
    Change,
    LogMark,
    TrainerState,
    TrainingCheckpoint,
    save_training_checkpoint,
)
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.storage.files import remove_directory, write_directory_atomically
from mhmoe_np.training.log_file import LogFile, mark_of_older
from mhmoe_np.training.run_folder import METRICS, QUANTIZATION, ROUTER, SET_ASIDE, VALIDATION_LOG
from mhmoe_np.training.step import Learner

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BEGINNING = LogMark(bytes=0, xxh3_128=xxhash.xxh3_128_hexdigest(b""))


class TrainingFailure(Exception):
    """Training cannot go on: the message says at which step, why, what was kept and what was lost."""


class Keeper:
    """The writing side of a run folder, whose lock the caller holds.

    Attributes:
        saved_step: of the newest checkpoint; 0 where there is none, as the start needs none.
        notices: a line for each log that is not as it was written, and on steps made again.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        start: TrainerState,
        changes: Sequence[Change],
        tokenizer: Tokenizer,
        learner: Learner,
        ops: Operations,
    ) -> None:
        """Go on from the checkpoint whose state is `start`; what the logs say of later steps goes.

        changes: those of the settings that this sitting makes.
        learner: what is saved as it stands when `save` is called.
        """
        self._run, self._config, self._tokenizer = run, config, tokenizer
        self._changes = [*start.changes, *changes]
        self._learner, self._ops, self.saved_step = learner, ops, start.step
        (run / CHECKPOINTS).mkdir(exist_ok=True)
        kept = {
            METRICS: True,
            ROUTER: config.model.moe_layers,
            QUANTIZATION: config.model.is_quantised,
            VALIDATION_LOG: config.training.eval_every or VALIDATION_LOG in (start.logs or {}),
        }
        names = [name for name, is_kept in kept.items() if is_kept]
        for later in best_models_of(run):
            if step_of(later) > start.step:  # of steps that are made again
                remove_directory(later)
        self._logs = {name: LogFile(run / name, self._mark(name, start)) for name in names}
        self._pending: list[tuple[str, dict[str, Any]]] = []  # lines that no log has yet
        self.notices = [log.notice for log in self._logs.values() if log.notice is not None]
        if again := self._logs[METRICS].cut:
            self.notices.append(
                f"{run}: the {again} steps that {METRICS} has after step {start.step} are made again"
            )

    def _mark(self, name: str, state: TrainerState) -> LogMark:
        if state.logs is None:
            return mark_of_older(self._run / name, state.step)
        return state.logs.get(name, BEGINNING)

    def close(self) -> None:
        """Nothing more comes."""
        for log in self._logs.values():
            log.close()

    def log(self, name: str, value: dict[str, Any]) -> None:
        """Append a line to a log.

        Raises OSError: the disk is full or refuses; the line waits for the next `save`.
        """
        self._pending.append((name, value))
        self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:
            name, value = self._pending[0]
            self._logs[name].write(value)
            del self._pending[0]

    def save(self, lines: Mapping[str, dict[str, Any]], *, trouble: OSError | None = None) -> None:
        """Write a checkpoint, unless there is one of this step, and drop the oldest.

        lines: for each log, a line that belongs to it.
        trouble: what the disk said just before: then the run ends, saved or not.
        Raises TrainingFailure: the disk is full or refuses; the newest checkpoint stays.
        """
        self._pending += lines.items()
        if trouble is None:
            try:
                self._write_checkpoint()
            except OSError as error:
                trouble = error
        if trouble is not None:
            self._save_on_a_full_disk(trouble)
        for old in checkpoints_of(self._run)[: -self._config.training.keep_checkpoints]:
            remove_directory(old)
        # Only now: a run that goes on from an older checkpoint finds what was the best then.
        for old in best_models_of(self._run)[:-1]:
            remove_directory(old)

    def keep_best(self) -> None:
        """Keep the model as it stands: none scored better. The one that was the best goes with `save`.

        Raises OSError: the disk is full or refuses; then nothing is left behind.
        """
        directory = self._run / CHECKPOINTS / f"{BEST}-{self._learner.updates:08d}"
        if not directory.exists():  # of a sitting that ended before its score was logged
            parameters = self._learner.parameters.to_host(self._ops)
            write_directory_atomically(
                directory, lambda temporary: save_model(temporary, parameters, self._tokenizer)
            )

    def _write_checkpoint(self) -> None:
        step = self._learner.updates
        if step == self.saved_step:
            return
        self._write_pending()
        for log in self._logs.values():
            log.flush()
        blas = self._ops.blas()
        state = TrainerState(
            step=step,
            config=self._config,
            backend=self._ops.name,
            blas=blas and blas.name,
            changes=self._changes,
            logs={name: log.mark for name, log in self._logs.items()},
        )
        directory = self._run / CHECKPOINTS / f"step-{step:08d}"
        parameters = self._learner.parameters.to_host(self._ops)
        moments = self._learner.moments.to_host(self._ops)
        checkpoint = TrainingCheckpoint(parameters, moments, state)
        save_training_checkpoint(directory, checkpoint, self._tokenizer)
        self.saved_step = step

    def _save_on_a_full_disk(self, error: OSError) -> NoReturn:
        """Save this step where damaged or older checkpoints were, if these make room; end the run.

        Raises TrainingFailure: it says what became of the steps since the newest checkpoint.
        """
        said = f"{error.filename}: {error.strerror}"
        for dispensable in self._dispensable() if error.errno in NO_ROOM else []:
            remove_directory(dispensable)
            try:
                self._write_checkpoint()
            except OSError:
                continue
            raise TrainingFailure(
                f"{said}; step {self.saved_step} is saved in the place of an older checkpoint, "
                f"nothing is lost; free some space and go on with: mhmoe-np train --resume {self._run}"
            )
        raise TrainingFailure(f"{said}; {self.kept()}, after freeing some space")

    def _dispensable(self) -> list[Path]:
        """What may go to make room for a checkpoint, first first; nothing if it would not be enough."""
        checkpoints = checkpoints_of(self._run)
        if not checkpoints:
            return []
        *older, newest = checkpoints
        found = [*(self._run / CHECKPOINTS).glob(f"{SET_ASIDE}*"), *older]
        room = shutil.disk_usage(self._run).free + sum(map(_size, found))
        return found if room >= _size(newest) else []

    def kept(self) -> str:
        """What is lost if the run ends now, and from where it goes on."""
        step, saved = self._learner.updates, self.saved_step
        # A signal may have come between a checkpoint's renaming and our taking note of it.
        saved = max([saved, *(step_of(path) for path in checkpoints_of(self._run))])
        lost = {0: "no step is", 1: f"step {step} is"}.get(
            step - saved, f"steps {saved + 1} to {step} are"
        )
        start = f"the checkpoint of step {saved}" if saved else "the start"
        return f"{lost} lost; go on from {start} with: mhmoe-np train --resume {self._run}"


def _size(folder: Path) -> int:
    """Bytes on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
