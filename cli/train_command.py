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
from mhmoe_cli.printing import duration, printable, visible
from mhmoe_cli.progress import may_show_bar, progress, shown, tell
from mhmoe_cli.run_settings import base_layers, option_tables, preset_option, set_option
from mhmoe_cli.text_options import lines_in_both_text
from mhmoe_np.errors import Interrupted, Taken, UserError
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import read_model_config
from mhmoe_np.settings.presets import DEFAULT_PRESET
from mhmoe_np.settings.run import COMMAND_LINE, Layer, resolve

if TYPE_CHECKING:
    from mhmoe_np.progress import OnProgress
    from mhmoe_np.training.trainer import StepReport, Trainer
    from mhmoe_np.training.validation import ValidationReport


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@preset_option
@click.option(
    "--data", multiple=True, metavar="PATH", help="Text file, folder, glob or store; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default: runs/NAME).")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--seed", type=int, help="Seed of weights, split and batches.")
@threads_option
@click.option("--checkpoint-every", type=int, metavar="N", help="Steps between checkpoints.")
@click.option(
    "--eval-every",
    type=int,
    metavar="N",
    help="Steps between scores of the held-out text (0: at the end).",
)
@click.option("--resume", metavar="auto|PATH", help="Continue a run, bit for bit.")
@click.option(
    "--init",
    metavar="CKPT",
    type=click.Path(path_type=Path),
    help="Start a new run from a checkpoint's weights and tokenizer (fine-tuning).",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files too.")
@set_option
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
    eval_every: int | None,
    resume: str | None,
    init: Path | None,
    tensorboard: bool,
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
    over = option_tables(
        settings,
        data,
        steps=steps,
        seed=seed,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        eval_every=eval_every,
    )
    name = config.stem if config else preset or DEFAULT_PRESET
    run = None if resume is None else folder_to_resume(resume, out, name)
    given = base_layers(config, preset) if config or preset else None
    if run is None:
        base = given or base_layers(None, None)
        if init is not None and given is None:
            model = read_model_config(init_source(init) / MODEL_CONFIG).model_dump()
            base = [*base, Layer({"model": model}, f"--init {init}")]
        resolved = resolve([*base, Layer(over, COMMAND_LINE)])
        with progress("bytes") as show:
            start = partial(
                start_run,
                config=resolved,
                init=init,
                backend=backend,
                threads=threads,
                on_progress=show,
            )
            trainer = start(out) if out else _start_in_a_fresh_folder(start, name)
        found = lines_in_both(trainer.run)
        if found is not None and found.held_out_lines:
            tell(lines_in_both_text(found))
    else:
        with progress("bytes") as show:
            trainer = resume_run(
                run, over, base=given, backend=backend, threads=threads, on_progress=show
            )
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
        tell(f"mhmoe-np: {printable(notice)}")
    if trainer.finished and is_evaluated(run):
        tell(f"{run} is finished: {trainer.step} steps were made")
        return
    size = trainer.learner.parameters.count
    started = time.perf_counter()
    verb = f"continuing at step {trainer.step} in" if trainer.step else "training in"
    tell(f"{verb} {run}: {size:,} parameters, {steps} steps")
    try:
        with _Progress(trainer) as shown_run:
            stopped = trainer.train(
                shown_run.show, _acknowledge, shown_run.show_validation, shown_run.show_scoring
            )
    except TrainingFailure as failure:
        _end_run(str(failure), 1)
    except Interrupted as second:
        _end_run(f"stopped at once: {trainer.keeper.kept()}", 128 + second.signal)
    if stopped is not None:
        tell(f"stopped at step {trainer.step}, saved; go on with: mhmoe-np train --resume {run}")
        raise click.exceptions.Exit(128 + stopped)
    try:
        with progress() as show:
            result = score_run(trainer, show)
    except Interrupted as stop:
        _end_run(
            f"stopped: the trained model is saved in {run}, only not scored; go on with: "
            f"mhmoe-np train --resume {run}",
            128 + stop.signal,
        )
    unwritten = None
    try:
        write_evaluation(trainer, result)
    except OSError as error:
        unwritten = (
            f"{error.filename}: {error.strerror}; the trained model is saved in {run}, only its scores "
            f"are not; free some space and run: mhmoe-np train --resume {run}"
        )
    click.echo("held-out text:")
    print_scores(result.scores)
    click.echo(f"\nsample:\n{visible(result.sample)}")
    if unwritten is not None:
        _end_run(unwritten, 1)
    _close(run, time.perf_counter() - started)


def _close(run: Path, seconds: float) -> None:
    """Write the run's page, and say where everything is and how to go on."""
    from mhmoe_np.report.run_page import write_run_page

    try:
        with progress() as show:
            show("writing the report", 0, 0)
            page = write_run_page(run)
    except OSError as error:
        _end_run(
            f"{error.filename}: {error.strerror}; nothing is lost but the report of {run}; free some "
            f"space and run: mhmoe-np report {run}",
            1,
        )
    tell(
        f"done in {duration(seconds)}: {run}; its report: {page}\n"
        f'go on with: mhmoe-np generate {run} --prompt "..."'
    )


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
        self._training = trainer.config.training
        self._started, self._first = time.perf_counter(), trainer.step
        self._bar, self._shown = None, contextlib.ExitStack()
        self._scoring = contextlib.ExitStack()
        self._show_scoring: OnProgress | None = None
        if may_show_bar():
            from mhmoe_cli.bars import Bar

            self._bar = Bar(transient=False)
            self._note = self._bar.note = f"step {trainer.step}/{self._training.steps}"
            self._bar.show("training", trainer.step, self._training.steps)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._shown.enter_context(shown(self._bar))
        return self

    def __exit__(self, *_: object) -> None:
        self._end_scoring()
        self._shown.close()

    def show(self, report: StepReport) -> None:
        """Show one step."""
        self._end_scoring()
        made = report.step - self._first
        rate = made / (time.perf_counter() - self._started)
        text = f"loss {report.loss:.4f}  {report.tokens_per_s:,.0f} tokens/s"
        steps, experts = self._training.steps, _experts(report)
        for warning in report.warnings:
            tell(f"warning: {warning.name}: step {report.step}, {warning.text}")
        if self._bar is not None:
            self._note = "\n".join(filter(None, (f"step {report.step}/{steps}  {text}", experts)))
            self._bar.note = self._note
            self._bar.show("training", report.step, steps)
        elif made == 1 or report.step % self._training.log_every == 0 or report.step == steps:
            tell(
                f"step {report.step}/{steps}  {text}  "
                f"lr {report.learning_rate:.2e}  gradient {report.gradient_norm:.2f}  "
                f"{(steps - report.step) / rate:.0f} s left"
            )
            if experts:
                tell(f"  {experts}")

    def show_scoring(self, doing: str, done: int, total: int) -> None:
        """Show how far a validation has come."""
        if self._bar is not None:
            self._bar.note = f"{self._note}\n{printable(doing)} {done / max(1, total):.0%}"
            return
        if self._show_scoring is None:
            self._show_scoring = self._scoring.enter_context(progress())
        self._show_scoring(doing, done, total)

    def _end_scoring(self) -> None:
        if self._bar is not None:
            self._bar.note = self._note
        self._scoring.close()
        self._show_scoring = None

    def show_validation(self, report: ValidationReport) -> None:
        """Show what a validation found."""
        self._end_scoring()
        scores = report.scores.items()
        each = "  ".join(f"{name} {score.as_dict()['bits_per_byte']:.4f}" for name, score in scores)
        line = f"validation at step {report.step}: mean NLL {report.mean_nll:.4f}; bits/byte: {each}"
        tell(printable(line))


def _experts(report: StepReport) -> str:
    """How the experts are used, of all layers the worst; empty for a dense model."""
    if not report.router:
        return ""
    uneven = min(layer.entropy for layer in report.router)
    dead = sum(layer.dead for layer in report.router)
    dropped = f"  dropped {report.dropped:,}" if report.dropped else ""
    return f"experts: entropy {uneven:.2f}  max/mean {report.busiest_expert:.1f}  dead {dead}{dropped}"
