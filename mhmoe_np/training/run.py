"""Starting a training run and going on with one: what `mhmoe-np train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mhmoe_np.checkpoints.checkpoint import (
    TOKENIZER,
    find_checkpoint,
    find_tokenizer,
    is_packed,
    load_weights,
)
from mhmoe_np.data.tokenizer import load_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.extras import check_installed
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import BackendName, Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.run import Layer, RunConfig, Tables
from mhmoe_np.storage.checksums import verify
from mhmoe_np.training.continuation import check_training_room, open_run, resumed_config
from mhmoe_np.training.preparation import InitialWeights, create_run_folder
from mhmoe_np.training.trainer import Trainer


def start_run(
    run: Path,
    config: RunConfig,
    *,
    init: Path | None = None,
    backend: BackendName = "numba",
    threads: int | None = None,
    on_progress: OnProgress = unseen,
) -> Trainer:
    """Make the run folder `run`, with its text prepared, and a trainer that has made no step yet.

    init: a checkpoint, or a run folder whose last one is taken, to start from in the place of random
    weights; its tokenizer is taken too unless the configuration names one.
    threads: None takes all cores.
    on_progress: is told how far the text is prepared; counts bytes.
    Raises UserError: `run` exists, or the text, the tokenizer, the checkpoint or the number of threads
    is unfit; then nothing was written.
    """
    ops = _operations(backend, threads, config)
    check_training_room(config)
    _check_event_files(config)
    lock = create_run_folder(
        run,
        config,
        None if init is None else _initial_weights(init_source(init, on_progress), config, on_progress),
        threads=threads or cores(),
        ops=ops,
        on_progress=on_progress,
    )
    opened = open_run(run, lock=lock, on_progress=on_progress)
    return Trainer(run, config, ops, opened=opened, on_progress=on_progress)


def init_source(init: Path, on_progress: OnProgress = unseen) -> Path:
    """The checkpoint that `--init` means: `init` itself, or the last one of that run folder.

    on_progress: counts the bytes of its files, which are all looked at.

    Raises UserError: there is none, it is packed, or it is damaged.
    """
    path = find_checkpoint(init)
    verify(path, on_progress)
    if is_packed(path):
        raise UserError(f"--init {path}: is packed; unpack it first")
    return path


def _initial_weights(path: Path, config: RunConfig, on_progress: OnProgress) -> InitialWeights:
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        if config.data.tokenizer is None:
            raise UserError(
                f"--init {path}: has no {TOKENIZER}; give the one that its ids are of with "
                "--set data.tokenizer=PATH"
            )
        tokenizer = load_tokenizer(config.data.tokenizer)
    weights = load_weights(path, config.model, np.float32, on_progress)
    return InitialWeights(path, weights, tokenizer)


def resume_run(
    run: Path,
    over: Tables | None = None,
    *,
    base: Sequence[Layer] | None = None,
    backend: BackendName = "numba",
    threads: int | None = None,
    on_progress: OnProgress = unseen,
) -> Trainer:
    """A trainer that goes on from the newest whole checkpoint of `run`: the same run, bit for bit.

    over, base: settings to go on with (see `resumed_config`), as `{"training": {"steps": 200}}`; those
    of the optimiser may change, and the run's checkpoints say since when.
    threads: None takes all cores.
    on_progress: counts the bytes of each file that is read.
    Raises UserError: the settings would make it another run, the folder is in use, or something in it
    is damaged.
    """
    opened = open_run(run, on_progress=on_progress)
    try:
        config = resumed_config(opened, over or {}, base=base)
        _check_event_files(config)
        ops = _operations(backend, threads, config)
        return Trainer(run, config, ops, opened=opened, on_progress=on_progress)
    except BaseException:
        opened.lock.release()
        raise


def _check_event_files(config: RunConfig) -> None:
    if config.training.tensorboard:
        check_installed(
            "tensorboardX",
            extra="tensorboard",
            needed_by="training.tensorboard",
            otherwise=", or leave the setting out",
        )


def _operations(backend: BackendName, threads: int | None, config: RunConfig) -> Operations:
    matmul = config.training.matmul
    return load_operations(backend, threads=threads, keep_buffers=True, matmul=matmul)
