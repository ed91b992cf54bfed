"""Which run folder a run goes into, and with which configuration it goes on."""

from __future__ import annotations

import re
from pathlib import Path

from mhmoe_np.checkpoints.checkpoint import CHECKPOINTS, checkpoints_of
from mhmoe_np.errors import UserError
from mhmoe_np.settings.run import FREE_KEYS, RunConfig, Tables, merge, parse_run_config
from mhmoe_np.training.run_folder import RUN_CONFIG, is_run_folder, read_run_tables

RUNS = Path("runs")  # where a run goes that was told no folder


def fresh_folder(name: str) -> Path:
    """runs/NAME, or the next free of runs/NAME-2, runs/NAME-3, ..."""
    numbers = _numbers(name)
    return _numbered(name, max(numbers) + 1 if numbers else 1)


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
    if run != path and path.resolve() != checkpoints_of(run.resolve())[-1]:
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
    matches = [pattern.fullmatch(path.name) for path in RUNS.glob(f"{name}*")]
    return [int(match[1] or 1) for match in matches if match]


def _numbered(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")


def resumed_config(run: Path, over: Tables, *, base: Tables | None = None) -> RunConfig:
    """The configuration that a run goes on with: `over` laid over the one it was started with.

    base: what `over` lies over instead, where that was given again.
    Raises UserError: a key is unfit, or differs that would make it another run (see `FREE_KEYS`).
    """
    saved_tables = read_run_tables(run)
    saved = parse_run_config(saved_tables, source=str(run / RUN_CONFIG)).model_dump()
    now = parse_run_config(merge(saved_tables if base is None else base, over), source="configuration")
    for table, values in now.model_dump().items():
        for key, value in values.items():
            old = saved[table][key]
            if value != old and f"{table}.{key}" not in FREE_KEYS:
                raise UserError(
                    f"{run}: was started with {table}.{key} = {old!r}, now {value!r} is given; "
                    "start another run with another --out"
                )
    return now
