"""`mhmoe-np train`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from mhmoe_cli.backend import backend_option, prepare, threads_option
from mhmoe_cli.printing import printable
from mhmoe_cli.progress import ByteProgress
from mhmoe_cli.run_settings import base_layers, option_tables
from mhmoe_cli.text_options import lines_in_both_text
from mhmoe_np.errors import Interrupted, Taken, UserError
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import read_model_config
from mhmoe_np.settings.presets import DEFAULT_PRESET
from mhmoe_np.settings.run import COMMAND_LINE, Layer, resolve

if TYPE_CHECKING:
    from mhmoe_np.training.trainer import StepReport, Trainer


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--preset", help=f"Named settings (default: {DEFAULT_PRESET}); see the README.")
@click.option(
    "--data", multiple=True, metavar="PATH", help="Text file, folder, glob or store; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default: runs/NAME).")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--seed", type=int, help="Seed of weights, split and batches.")
@threads_option
@click.option("--checkpoint-every", type=int, metavar="N", help="Steps between checkpoints.")
@click.option("--resume", metavar="auto|PATH", help="Continue a run, bit for bit.")
@click.option(
    "--init",
    metavar="CKPT",
    type=click.Path(path_type=Path),
    help="Start a new run from a checkpoint's weights and tokenizer (fine-tuning).",
)
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
    init: Path | None,
    settings: tuple[str, ...],
    backend: BackendName,
) -> None:
    """Train a language model; with no arguments, a small MH-MoE on the embedded corpus.

    CONFIG.toml has tables [model], [data], [training] and [optimizer]; --preset lies under it,
    --set and the named options over it.
    """
    prepare(backend)
    from mhmoe_np.checkpoints.checkpoint import MODEL_CONFIG
    from mhmoe_np.training.continuation import folder_to_resume
    from mhmoe_np.training.run import init_source, resume_run, start_run
    from mhmoe_np.training.run_folder import lines_in_both

    if init is not None and resume not in (None, "auto"):
        raise UserError("--init: starts a new run; give either --init or --resume")
    over = option_tables(settings, data, steps=steps, seed=seed, checkpoint_every=checkpoint_every)
    name = config.stem if config else preset or DEFAULT_PRESET
    run = None if resume is None else folder_to_resume(resume, out, name)
    given = base_layers(config, preset) if config or preset else None
    if run is None:
        base = given or base_layers(None, None)
        if init is not None and given is None:
            model = read_model_config(init_source(init) / MODEL_CONFIG).model_dump()
            base = [*base, Layer({"model": model}, f"--init {init}")]
        resolved = resolve([*base, Layer(over, COMMAND_LINE)])
        with ByteProgress() as progress:
            start = partial(
                start_run,
                config=resolved,
                init=init,
                backend=backend,
                threads=threads,
                on_progress=progress.show,
            )
            trainer = start(out) if out else _start_in_a_fresh_folder(start, name)
        found = lines_in_both(trainer.run)
        if found is not None and found.held_out_lines:
            _tell(lines_in_both_text(found))
    else:
        trainer = resume_run(run, over, base=given, backend=backend, threads=threads)
    _train(trainer)


def _start_in_a_fresh_folder(start: Callable[[Path], Trainer], name: str) -> Trainer:
    """In runs/NAME or the next free one; another process may be faster, then it is the one after."""
    from mhmoe_np.training.continuation import fresh_folder

    while True:
        folder = fresh_folder(name)
        try:
            return start(folder)
        except Taken:
            if not folder.exists() and fresh_folder(name) == folder:
                raise


def _train(trainer: Trainer) -> None:
    from mhmoe_cli.scores import print_scores
    from mhmoe_np.training.finish import score_run, write_evaluation
    from mhmoe_np.training.keeper import TrainingFailure
    from mhmoe_np.training.run_folder import is_evaluated

    run, steps = trainer.run, trainer.config.training.steps
    for notice in trainer.notices:
        _tell(f"mhmoe-np: {printable(notice)}")
    if trainer.finished and is_evaluated(run):
        _tell(f"{run} is finished: {trainer.step} steps were made")
        return
    size = trainer.learner.parameters.count
    verb = f"continuing at step {trainer.step} in" if trainer.step else "training in"
    _tell(f"{verb} {run}: {size:,} parameters, {steps} steps")
    try:
        with _Progress(trainer) as progress:
            stopped = trainer.train(progress.show, _acknowledge)
    except TrainingFailure as failure:
        _end_run(str(failure), 1)
    except Interrupted as second:
        _end_run(f"stopped at once: {trainer.keeper.kept()}", 128 + second.signal)
    if stopped is not None:
        _tell(f"stopped at step {trainer.step}, saved; go on with: mhmoe-np train --resume {run}")
        raise click.exceptions.Exit(128 + stopped)
    try:
        result = score_run(trainer)
    except Interrupted as stop:
        _end_run(
            f"stopped: the trained model is saved in {run}, only not scored; go on with: "
            f"mhmoe-np train --resume {run}",
            128 + stop.signal,
        )
    unwritten = None
    try:
        write_evaluation(run, result)
    except OSError as error:
        unwritten = (
            f"{error.filename}: {error.strerror}; the trained model is saved in {run}, only its scores "
            f"are not; free some space and run: mhmoe-np train --resume {run}"
        )
    click.echo("held-out text:")
    print_scores(result.scores)
    click.echo(f"\nsample:\n{result.sample}")
    if unwritten is not None:
        _end_run(unwritten, 1)


def _tell(line: str) -> None:
    """Say something on standard error.

    Only a reader that went away ends the run; one that writes to a full disk does not.
    """
    try:
        click.echo(line, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def _acknowledge(kind: int) -> None:
    """Say that a signal was heard; within its handler, where only a bare write is safe."""
    name = signal.Signals(kind).name
    with contextlib.suppress(OSError):
        os.write(
            2,
            f"\n{name}: this step is finished and saved, then the run stops; once more: it stops at "
            "once, and what was not saved is lost\n".encode(),
        )


def _end_run(line: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        click.echo(f"mhmoe-np: {printable(line)}", err=True)
    raise click.exceptions.Exit(code)


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
            with contextlib.suppress(OSError):  # the terminal is gone
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
            _tell(
                f"step {report.step}/{self._training.steps}  {text}  "
                f"lr {report.learning_rate:.2e}  gradient {report.gradient_norm:.2f}  "
                f"{left:.0f} s left"
            )
