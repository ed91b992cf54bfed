"""Starting a training run and going on with one: what `mhmoe-np train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mhmoe_np.checkpoints.checkpoint import TOKENIZER, find_checkpoint, load_weights
from mhmoe_np.checkpoints.training_state import TrainerState, TrainingCheckpoint
from mhmoe_np.errors import UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.room import check_batch_room, check_room
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.run import Layer, RunConfig, Tables
from mhmoe_np.storage.checksums import verify
from mhmoe_np.training.continuation import open_run, resumed_config
from mhmoe_np.training.preparation import create_run_folder
from mhmoe_np.training.trainer import Trainer


def start_run(
    run: Path,
    config: RunConfig,
    *,
    init: Path | None = None,
    backend: BackendName = "numba",
    threads: int | None = None,
) -> Trainer:
    """Make the run folder `run`, with its text prepared, and a trainer that has made no step yet.

    init: a checkpoint, or a run folder whose last one is taken, to start from in the place of random
    weights; its tokenizer is taken too unless the configuration names one.
    threads: None takes all cores.
    Raises UserError: `run` exists, or the text, the tokenizer, the checkpoint or the number of threads
    is unfit; then nothing was written.
    """
    ops = load_operations(backend, threads=threads, keep_buffers=True)
    _check_room(config)
    start = None
    if init is not None:
        config, start = _initial_checkpoint(find_checkpoint(init), config)
    lock = create_run_folder(run, config, start, threads=threads or cores(), backend=backend)
    return Trainer(run, config, ops, opened=open_run(run, lock=lock))


def _initial_checkpoint(path: Path, config: RunConfig) -> tuple[RunConfig, TrainingCheckpoint]:
    """Step 0 with the weights of a checkpoint, and the configuration with its tokenizer."""
    verify(path)
    if config.data.tokenizer is None:
        if not (path / TOKENIZER).is_file():
            raise UserError(
                f"--init {path}: has no {TOKENIZER}; give the one that its ids are of with "
                "--set data.tokenizer=PATH"
            )
        data = config.data.model_copy(update={"tokenizer": str(path / TOKENIZER)})
        config = config.model_copy(update={"data": data})
    parameters = load_weights(path, config.model, np.float32)
    moments = Moments.zeros(config.model, np.float32)
    return config, TrainingCheckpoint(parameters, moments, TrainerState(step=0, config=config, logs={}))


def resume_run(
    run: Path,
    over: Tables | None = None,
    *,
    base: Sequence[Layer] | None = None,
    backend: BackendName = "numba",
    threads: int | None = None,
) -> Trainer:
    """A trainer that goes on from the newest whole checkpoint of `run`: the same run, bit for bit.

    over, base: settings to go on with (see `resumed_config`), as `{"training": {"steps": 200}}`; those
    of the optimiser may change, and the run's checkpoints say since when.
    threads: None takes all cores.
    Raises UserError: the settings would make it another run, the folder is in use, or something in it
    is damaged.
    """
    ops = load_operations(backend, threads=threads, keep_buffers=True)
    opened = open_run(run)
    config = resumed_config(opened, over or {}, base=base)
    _check_room(config)
    return Trainer(run, config, ops, opened=opened)


def _check_room(config: RunConfig) -> None:
    """Refuse what the free memory cannot hold, before anything is written.

    Raises UserError: see `mhmoe_np.model.room`.
    """
    training = config.training
    sequences = training.batch_size // training.gradient_accumulation_steps
    check_room(config.model, copies=4, source="model")
    tokens = sequences * training.sequence_length
    check_batch_room(config.model, tokens=tokens, source="training.batch_size")
