"""`mhmoe-np train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import announce_compilation, backend_option, threads_option
from mhmoe_cli.run_settings import base_tables, option_tables
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.presets import DEFAULT_PRESET
from mhmoe_np.settings.run import merge, parse_run_config

if TYPE_CHECKING:
    from mhmoe_np.training.trainer import StepReport, Trainer


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
    from mhmoe_np.training.continuation import folder_to_resume, fresh_folder
    from mhmoe_np.training.run import resume_run, start_run

    base = base_tables(config, preset)
    over = option_tables(settings, data, steps=steps, seed=seed, checkpoint_every=checkpoint_every)
    name = config.stem if config else preset or DEFAULT_PRESET
    run = None if resume is None else folder_to_resume(resume, out, name)
    if backend == "numba":
        announce_compilation()
    if run is None:
        resolved = parse_run_config(merge(base, over), source="configuration")
        trainer = start_run(out or fresh_folder(name), resolved, backend=backend, threads=threads)
    else:
        given = base if config or preset else None
        trainer = resume_run(run, over, base=given, backend=backend, threads=threads)
    _train(trainer)


def _train(trainer: Trainer) -> None:
    from mhmoe_cli.scores import print_scores
    from mhmoe_np.training.finish import finish_run
    from mhmoe_np.training.run_folder import is_evaluated
    from mhmoe_np.training.trainer import TrainingFailure

    run, steps = trainer.run, trainer.config.training.steps
    if trainer.finished and is_evaluated(run):
        click.echo(f"{run} is finished: {trainer.step} steps were made", err=True)
        return
    size = sum(tensor.size for tensor in trainer.learner.parameters.tensors.values())
    verb = f"continuing at step {trainer.step} in" if trainer.step else "training in"
    click.echo(f"{verb} {run}: {size:,} parameters, {steps} steps", err=True)
    with _Progress(trainer) as progress:
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
    result = finish_run(trainer)
    click.echo("held-out text:")
    print_scores(result.scores)
    click.echo(f"\nsample:\n{result.sample}")


class _Progress:
    """A bar with loss, speed and time left on a terminal; plain lines elsewhere."""

    def __init__(self, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._training = trainer.config.training
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
            self._task = self._bar.add_task("", total=self._training.steps, completed=trainer.step)

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
