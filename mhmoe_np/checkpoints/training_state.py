"""Training checkpoints: a model's checkpoint, AdamW's moments, and where the run stands.

Source   [spec 1 Checkpoint directory]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import OPTIMIZER, load_weights, write_model_files
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import Natural, StrictModel, first_fault
from mhmoe_np.settings.run import RunConfig, differences, may_change
from mhmoe_np.storage.checksums import CHECKSUMS, seal, verify
from mhmoe_np.storage.files import write_directory_atomically, write_json
from mhmoe_np.storage.reading import read_json
from mhmoe_np.storage.tensors import check_finite, read_into, write_tensors

STATE = "trainer_state.json"


class LogMark(StrictModel):
    """How far a log had come, and the checksum of it so far."""

    bytes: Natural
    xxh3_128: str


class Change(StrictModel):
    """What another sitting changed after `step` updates: a setting, the backend or its BLAS."""

    step: Natural
    key: str
    before: Any
    now: Any


class TrainerState(StrictModel):
    """Where a run stands; with the weights and the moments it is all that a resumed run needs.

    Batches, weights and schedule are pure functions of (seed, step), so no generator's state is kept.
    """

    version: Literal[3] = 3
    step: Natural  # updates made
    config: RunConfig  # as it stands now
    backend: str | None = None  # that it was trained on last; None: not said
    blas: str | None = None  # the library of its products then; None: not said, or a device's
    changes: list[Change] = Field(default_factory=list)
    logs: dict[str, LogMark] | None = None  # None: from an older release, which kept no marks


class TrainingCheckpoint(NamedTuple):
    """Parameters and moments on the host, float32, and the state."""

    parameters: Parameters
    moments: Moments
    state: TrainerState


def save_training_checkpoint(
    directory: Path, checkpoint: TrainingCheckpoint, tokenizer: Tokenizer
) -> None:
    """Write a checkpoint that training goes on from, as `directory`, which must not exist yet.

    Raises OSError: the disk is full or refuses; then nothing is left behind.
    """
    write_directory_atomically(
        directory, lambda temporary: write_training_checkpoint(temporary, checkpoint, tokenizer)
    )


def write_training_checkpoint(
    directory: Path, checkpoint: TrainingCheckpoint, tokenizer: Tokenizer
) -> None:
    """Put a training checkpoint into `directory`.

    Raises OSError: the disk is full or refuses.
    """
    parameters, moments, state = checkpoint
    names = write_model_files(directory, parameters, tokenizer)
    write_tensors(directory / OPTIMIZER, moments.tensors())
    write_json(directory / STATE, state.model_dump())
    seal(directory, [*names, OPTIMIZER, STATE])


def load_training_checkpoint(
    directory: Path, started_with: RunConfig, on_progress: OnProgress = unseen
) -> TrainingCheckpoint:
    """What `save_training_checkpoint` wrote, for a run that was started with this configuration.

    on_progress: counts the bytes of each file.

    Raises UserError: a file is missing, damaged, not finite, or of another run.
    """
    sealed = verify(directory, on_progress)
    state = _read_state(directory / STATE, started_with, sealed=sealed)
    config = state.config.model
    parameters = load_weights(directory, config, np.float32, on_progress)
    moments = Moments.zeros(config, np.float32)
    read_into(directory / OPTIMIZER, moments.tensors(), on_progress)
    check_finite(directory / OPTIMIZER, moments.tensors())
    return TrainingCheckpoint(parameters, moments, state)


def load_trainer_state(directory: Path, started_with: RunConfig) -> TrainerState:
    """The state alone, for who wants to know how a run stands and not to go on with it.

    Raises Damaged, UserError: as `load_training_checkpoint`, of the state's file.
    """
    return _read_state(directory / STATE, started_with, sealed=(directory / CHECKSUMS).is_file())


def _read_state(path: Path, started_with: RunConfig, *, sealed: bool) -> TrainerState:
    values = read_json(path)
    version = values.get("version") if isinstance(values, dict) else None
    if version in (1, 2):
        state = _read_older_state(path, values, started_with)
    else:
        try:
            state = TrainerState.model_validate(values)
        except ValidationError as error:
            raise Damaged(f"{path}: {first_fault(error, TrainerState.model_fields)}") from None
        if not sealed:
            raise Damaged(f"{path.parent / CHECKSUMS}: no such file: nothing says that all is whole")
    if path.parent.name != f"step-{state.step:08d}":
        raise Damaged(f"{path}: says step {state.step}, its folder is {path.parent.name}")
    if not all(may_change(key) for key in differences(state.config, started_with)):
        raise UserError(f"{path.parent}: is of another run: it has another configuration")
    return state


class _OlderState(StrictModel):
    """Versions 1 and 2; the first also said what follows from the configuration."""

    version: Literal[1, 2]
    step: Natural
    config_sha256: str  # of the run's configuration, less `FREE_KEYS`
    seed: Natural | None = None
    sequences: Natural | None = None


def _read_older_state(path: Path, values: dict[str, Any], started_with: RunConfig) -> TrainerState:
    try:
        older = _OlderState.model_validate(values)
    except ValidationError as error:
        raise Damaged(f"{path}: {first_fault(error, _OlderState.model_fields)}") from None
    training = started_with.training
    wanted = (started_with.identity(), training.seed, older.step * training.batch_size)
    found = (
        older.config_sha256,
        training.seed if older.seed is None else older.seed,
        wanted[2] if older.sequences is None else older.sequences,
    )
    if found != wanted:
        raise UserError(f"{path.parent}: is of another run: it has another configuration")
    return TrainerState(step=older.step, config=started_with)
