"""`mhmoe-np train`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.run_settings import base_tables, flag_tables

from mhmoe_np.errors import UserError
from mhmoe_np.operations.load import cores
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.presets import DEFAULT_PRESET
from mhmoe_np.settings.run import (
    FREE_KEYS,
    RunConfig,
    Tables,
    merge,
    parse_run_config,
    with_settings,
)
from mhmoe_np.storage.files import write_json

if TYPE_CHECKING:
    from mhmoe_np.operations.table import Operations
    from mhmoe_np.training.trainer import StepReport, Trainer

SAMPLE_TOKENS = 120


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--preset", help=f"Named settings (default: {DEFAULT_PRESET}); see the README.")
@click.option("--data", multiple=True, metavar="PATH", help="Text file, folder or glob; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default: runs/NAME).")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--seed", type=int, help="Seed of weights, split and batches.")
@threads_option
@click.option("--checkpoint-every", type=int, metavar="N", help="Steps between checkpoints.")
@click.option("--resume", metavar="auto|PATH", help="Continue a run, bit for bit.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable.")
@backend_option
def command(
    config: Path | None,
    preset: str | None,
    data: tuple[str, ...],
    out: Path | None,
    steps: int | None,
    seed: int | None,
    threads: int | None,
    checkpoint_every: int | None,
    resume: str | None,
    settings: tuple[str, ...],
    backend: BackendName,
) -> None:
    """Train a language model; with no arguments, a small MH-MoE on the embedded corpus.

    CONFIG.toml has tables [model], [data], [training] and [optimizer]; --preset lies under it,
    --set and the named options over it.
    """
    base = base_tables(config, preset)
    flags = flag_tables(data, steps, seed, checkpoint_every)
    name = config.stem if config else preset or DEFAULT_PRESET
    run = _continued(resume, out, name)
    ops = load(backend, threads=threads, keep_buffers=True)
    if run is None:
        run = out or _fresh(Path("runs"), name)
        _start(run, base, settings, flags, threads=threads or cores(), backend=backend)
    resolved = _resolve(run, base if config or preset else None, settings, flags)
    _train(run, resolved, ops)


def _fresh(folder: Path, name: str) -> Path:
    """runs/NAME, or the next free of runs/NAME-2, runs/NAME-3, ..."""
    numbers = _numbers(folder, name)
    return folder / (name if not numbers else f"{name}-{max(numbers) + 1}")


def _numbers(folder: Path, name: str) -> list[int]:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    matches = [pattern.fullmatch(path.name) for path in folder.glob(f"{name}*")]
    return [int(match[1] or 1) for match in matches if match]


def _continued(resume: str | None, out: Path | None, name: str) -> Path | None:
    """The run folder to go on with, or None: start a new one."""
    from mhmoe_np.checkpoints.checkpoint import CHECKPOINTS, checkpoints_of
    from mhmoe_np.training.run_folder import is_run_folder

    if resume is None:
        return None
    if resume == "auto":
        numbers = _numbers(Path("runs"), name)
        last = max(numbers, default=1)
        run = out or Path("runs") / (name if last == 1 else f"{name}-{last}")
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


def _start(
    run: Path,
    base: Tables,
    settings: tuple[str, ...],
    flags: Tables,
    *,
    threads: int,
    backend: str,
) -> None:
    from mhmoe_np.training.run_folder import create_run_folder

    resolved = parse_run_config(merge(with_settings(base, settings), flags), source="configuration")
    create_run_folder(run, resolved, threads=threads, backend=backend)


def _resolve(run: Path, given: Tables | None, settings: tuple[str, ...], flags: Tables) -> RunConfig:
    """The run's saved configuration under what the command line says now.

    Raises UserError: they differ in a key that would make it another run.
    """
    from mhmoe_np.training.run_folder import CONFIG, read_run_tables

    saved_tables = read_run_tables(run)
    saved = parse_run_config(saved_tables, source=str(run / CONFIG))
    base = given if given is not None else saved_tables
    now = parse_run_config(merge(with_settings(base, settings), flags), source="configuration")
    for table, values in now.model_dump().items():
        for key, value in values.items():
            old = saved.model_dump()[table][key]
            if value != old and f"{table}.{key}" not in FREE_KEYS:
                raise UserError(
                    f"{run}: was started with {table}.{key} = {old!r}, now {value!r} is given; "
                    "start another run with another --out"
                )
    return now


def _train(run: Path, config: RunConfig, ops: Operations) -> None:
    from mhmoe_np.training.run_folder import EVALUATION
    from mhmoe_np.training.trainer import Trainer, TrainingFailure

    trainer = Trainer(run, config, ops)
    if trainer.finished and (run / EVALUATION).exists():
        click.echo(f"{run} is finished: {trainer.step} steps were made", err=True)
        return
    size = sum(tensor.size for tensor in trainer.learner.parameters.tensors.values())
    verb = f"continuing at step {trainer.step} in" if trainer.step else "training in"
    click.echo(f"{verb} {run}: {size:,} parameters, {config.training.steps} steps", err=True)
    with _Progress(config, trainer) as progress:
        try:
            stopped = trainer.train(progress.show)
        except TrainingFailure as failure:
            click.echo(f"mhmoe-np: {failure}", err=True)
            raise click.exceptions.Exit(1) from None
    if stopped is not None:
        click.echo(
            f"stopped at step {trainer.step}, saved; go on with: mhmoe-np train --resume {run}",
            err=True,
        )
        raise click.exceptions.Exit(128 + stopped)
    _finish(run, trainer, ops)


def _finish(run: Path, trainer: Trainer, ops: Operations) -> None:
    """The held-out text's scores and a sample."""
    from mhmoe_cli.scores import print_scores

    from mhmoe_np.data.tokenizer import load_tokenizer
    from mhmoe_np.inference.evaluate import evaluate
    from mhmoe_np.inference.generate import Sampling, generate
    from mhmoe_np.training.run_folder import EVALUATION, TOKENIZER, validation_domains

    tokenizer = load_tokenizer(run / TOKENIZER)
    scores = {
        domain.name: evaluate(trainer.learner.model, domain, tokenizer, ops=ops)
        for domain in validation_domains(run)
    }
    click.echo("held-out text:")
    print_scores(scores)
    click.echo("\nsample:")
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=trainer.config.training.seed)
    room = min(SAMPLE_TOKENS, trainer.config.model.max_position_embeddings - 1)
    pieces = generate(
        trainer.learner.model, tokenizer, "", max_new_tokens=room, sampling=sampling, ops=ops
    )
    click.echo("".join(pieces))
    write_json(run / EVALUATION, {"domains": {name: score.as_dict() for name, score in scores.items()}})


class _Progress:
    """A bar with loss, speed and time left on a terminal; plain lines elsewhere."""

    def __init__(self, config: RunConfig, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._training = config.training
        self._started, self._first = time.perf_counter(), trainer.step
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=config.training.steps, completed=trainer.step)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, report: StepReport) -> None:
        """Show one step."""
        made = report.step - self._first
        rate = made / (time.perf_counter() - self._started)
        text = f"loss {report.loss:.4f}  {report.tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=text)
        elif made == 1 or report.step % self._training.log_every == 0:
            left = (self._training.steps - report.step) / rate
            click.echo(
                f"step {report.step}/{self._training.steps}  {text}  "
                f"lr {report.learning_rate:.2e}  gradient {report.gradient_norm:.2f}  "
                f"{left:.0f} s left",
                err=True,
            )
