"""Starting a training run and going on with one: what `mhmoe-np train` calls."""

from __future__ import annotations

from pathlib import Path

from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.run import RunConfig, Tables
from mhmoe_np.training.continuation import resumed_config
from mhmoe_np.training.preparation import create_run_folder
from mhmoe_np.training.trainer import Trainer


def start_run(
    run: Path, config: RunConfig, *, backend: BackendName = "numba", threads: int | None = None
) -> Trainer:
    """Make the run folder `run`, with its text prepared, and a trainer that has made no step yet.

    threads: None takes all cores.
    Raises UserError: `run` exists, or the text, the tokenizer or the number of threads is unfit.
    """
    ops = load_operations(backend, threads=threads, keep_buffers=True)
    create_run_folder(run, config, threads=threads or cores(), backend=backend)
    return Trainer(run, config, ops)


def resume_run(
    run: Path,
    over: Tables | None = None,
    *,
    base: Tables | None = None,
    backend: BackendName = "numba",
    threads: int | None = None,
) -> Trainer:
    """A trainer that goes on from the last checkpoint of `run`: the same run, bit for bit.

    over, base: settings to go on with (see `resumed_config`), as `{"training": {"steps": 200}}`.
    threads: None takes all cores.
    Raises UserError: the settings would make it another run, or something in the folder is damaged.
    """
    ops = load_operations(backend, threads=threads, keep_buffers=True)
    return Trainer(run, resumed_config(run, over or {}, base=base), ops)
