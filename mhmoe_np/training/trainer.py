"""The training loop: batches in, weights out, and nothing lost but the current step.

A batch is a pure function of (seed, step) and nothing else is random, so a resumed run is the same
run, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from mhmoe_np.checkpoints.failure import FailureRecord, save_failure
from mhmoe_np.checkpoints.training_state import TrainerState, TrainingCheckpoint
from mhmoe_np.data.store import TOKENIZER
from mhmoe_np.data.tokenizer import load_tokenizer
from mhmoe_np.model.loss import Batch, loss
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.sums import StepResult
from mhmoe_np.model.weights import MatrixCounts
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.storage.checksums import unseal
from mhmoe_np.storage.files import remove_directory
from mhmoe_np.training.continuation import OpenRun, changes, open_run
from mhmoe_np.training.diagnosis import diagnose
from mhmoe_np.training.event_file import EventFile
from mhmoe_np.training.keeper import Keeper, TrainingFailure
from mhmoe_np.training.router_statistics import (
    LayerBalance,
    LayerRouting,
    RouterAlarm,
    RouterWarning,
    RouterWatch,
    choices_of_a_step,
)
from mhmoe_np.training.run_folder import (
    EVALUATION,
    FAILURE,
    METRICS,
    QUANTIZATION,
    ROUTER,
    VALIDATION_LOG,
    batches_of,
    training_tokens,
)
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner
from mhmoe_np.training.stopping import collected_signals
from mhmoe_np.training.validation import HeldOutText, Validation, ValidationReport
from mhmoe_np.types import IntArray


class QuantisedShares(NamedTuple):
    """How the quantised weights of the whole model are shared out after an update."""

    minus: float
    zero: float
    plus: float
    flipped: int  # weights whose quantised value this update changed

    @classmethod
    def of(cls, counts: Mapping[str, MatrixCounts]) -> Self | None:
        """The sums over all matrices, or None without any."""
        if not counts:
            return None
        minus, zero, plus, flipped = (
            sum(column) for column in zip(*(matrix[1:] for matrix in counts.values()), strict=True)
        )
        size = minus + zero + plus
        return cls(minus / size, zero / size, plus / size, flipped)


class StepReport(NamedTuple):
    """One step of a run: a line of `metrics.jsonl`."""

    step: int  # counted from 1
    loss: float  # nats; nll + the coefficients times the two below
    nll: float
    aux_loss: float  # summed over layers
    z_loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    dropped: int  # choices beyond capacity
    busiest_expert: float  # the largest share of choices, times E: 1 when balanced; the worst layer
    tokens: int  # trained on so far
    tokens_per_s: float
    quantised: QuantisedShares | None  # after the update; None: the model has no such weights
    router: list[LayerBalance]  # of each MoE layer
    warnings: list[RouterWarning]  # of routers, first raised at this step; no part of the line

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON has it; what the model does not have is left out."""
        values = self._asdict()
        del values["warnings"]
        quantised, router = values.pop("quantised"), values.pop("router")
        if quantised is not None:
            values["quantised"] = quantised._asdict()
        if router:
            values["router"] = [layer._asdict() for layer in router]
        return values


class Trainer:
    """A run in a run folder, from its newest whole checkpoint or from the start, and its only writer.

    Attributes:
        run: the folder.
        config: what the run does.
        ops: the backend that it runs on.
        learner: the model as trained so far, and what training it needs.
        keeper: writes the run's logs and checkpoints.
        held_out: the held-out text.
        validation: its scores so far.
        notices: what the run's owner should know before it goes on, a line each.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        ops: Operations,
        *,
        opened: OpenRun | None = None,
        on_progress: OnProgress = unseen,
    ) -> None:
        """Open the run's data and state.

        opened: the run, where the caller has it open already.
        on_progress: counts the bytes of each file that is read.
        Raises UserError: it is in use, or the data or the checkpoints are damaged or of another
        configuration.
        """
        opened = opened or open_run(run, on_progress=on_progress)
        self.run, self.config, self.ops = run, config, ops
        self._lock = opened.lock
        self._batches = batches_of(training_tokens(run, on_progress), config)
        start = opened.checkpoint or _beginning(config, on_progress)
        self.learner = Learner(start.parameters, start.moments, updates=start.state.step, ops=ops)
        changed = changes(opened, config, ops)
        self.tokenizer = load_tokenizer(run / TOKENIZER)
        self.keeper = Keeper(run, config, start.state, changed, self.tokenizer, self.learner, ops)
        self.held_out = HeldOutText(run, self.tokenizer)
        self.validation = Validation(run, every=config.training.eval_every)
        self._alarm = RouterAlarm(config.model)
        self._events: EventFile | None = None
        self.notices = [
            *opened.notices,
            *self.keeper.notices,
        ]
        if not self.finished:
            self.notices += [
                f"{run}: from step {c.step} on {c.key} is {c.now}; it was {c.before}" for c in changed
            ]

    @property
    def step(self) -> int:
        """Updates made."""
        return self.learner.updates

    @property
    def finished(self) -> bool:
        """Whether every step was made."""
        return self.step >= self.config.training.steps

    def close(self) -> None:
        """Let others have the run folder."""
        if self._events is not None:
            self._events.close()
        self.keeper.close()
        self._lock.release()

    def train(
        self,
        on_step: Callable[[StepReport], None] | None = None,
        on_signal: Callable[[int], None] | None = None,
        on_validation: Callable[[ValidationReport], None] | None = None,
        on_progress: OnProgress = unseen,
    ) -> int | None:
        """Go on to the last step; return the signal that ended it early, if one did.

        on_step: called with each step's report. Whatever it raises, the step is saved first.
        on_signal: called at once when SIGINT, SIGTERM or SIGHUP comes, from within the handler.
        Such a signal ends the run after the current step, with a checkpoint; a second one at once. Only
        the main thread can catch them, so call it there.
        on_validation: called with the held-out text's scores, every `eval_every` steps.
        on_progress: called while the held-out text is scored, which a signal breaks off: it is scored
        first of all when the run goes on.

        Raises TrainingFailure: a number is not finite, or the disk is full; Interrupted: a second
        signal came, and what was not saved yet is lost.
        """
        if not self.finished:
            unseal(self.run, EVALUATION)
            (self.run / EVALUATION).unlink(missing_ok=True)  # of fewer steps
        # What is not finite is found by the step's own sums; NumPy need not warn of it as well.
        with collected_signals(on_signal) as received, np.errstate(all="ignore"):
            validate = partial(self._validate, received, on_validation, on_progress)
            if trouble := validate():
                self._save({}, trouble)
            if received:
                return received[0]
            while not self.finished:
                report, matrices, routings = self._train_step()
                trouble = self._log(report, routings)
                try:
                    if on_step is not None:
                        on_step(report)
                    if trouble is None:
                        trouble = validate()
                except Exception:
                    self._save(matrices, trouble)
                    raise
                due = self.step % self.config.training.checkpoint_every == 0 or self.finished
                saved = due or bool(received) or trouble is not None
                if saved:
                    self._save(matrices, trouble)
                if saved and received:
                    return received[0]
        return None

    def _validate(
        self,
        received: Sequence[int],
        on_validation: Callable[[ValidationReport], None] | None,
        on_progress: OnProgress,
    ) -> OSError | None:
        """Score the held-out text if that is due and no signal came; keep the model if it is the best.

        Returns what the disk said, if it is full or refuses.
        """

        def watch(doing: str, done: int, total: int) -> None:
            if received:
                raise _BrokenOff
            on_progress(doing, done, total)

        if received or not self.validation.is_due(self.step, last=self.finished):
            return None
        try:
            scores = self.held_out.scores(self.learner.model, ops=self.ops, on_progress=watch)
        except _BrokenOff:
            return None
        report = ValidationReport(self.step, scores)
        try:
            if self.validation.is_best(report):
                self._check_state()
                self.keeper.keep_best()
            self.keeper.log(VALIDATION_LOG, report.as_dict())
            if self.config.training.tensorboard:
                self._event_file(self.step).add_validation(report.as_dict())
        except OSError as error:
            return error
        self.validation.reports.append(report)
        if on_validation is not None:
            on_validation(report)
        return None

    def _train_step(self) -> tuple[StepReport, dict[str, MatrixCounts], list[LayerRouting]]:
        start = time.perf_counter()
        training, model = self.config.training, self.config.model
        windows = self._next_windows()
        settings = self._settings()
        step = self.step + 1
        looked_at = model.moe_layers and (step == 1 or step % training.router_every == 0)
        watch = RouterWatch(model, ops=self.ops) if looked_at else None
        result = self.learner.step([Batch.of(part) for part in windows], settings, watch)
        if not result.is_finite:
            raise self._failure(f"step {self.step + 1}", result, windows)
        losses, statistics, norm, matrices, *_ = result
        routings = [] if watch is None else watch.layers()
        moe_layers = filter(model.is_moe_layer, range(model.num_hidden_layers))
        balances = [LayerBalance.of(*layer) for layer in zip(moe_layers, statistics, strict=True)]
        batch_tokens = training.batch_size * training.sequence_length
        report = StepReport(
            step=self.step,
            **losses._asdict(),
            learning_rate=settings.learning_rate,
            gradient_norm=norm,
            dropped=sum(layer.dropped for layer in balances),
            busiest_expert=max((layer.max_over_mean for layer in balances), default=1.0),
            tokens=self.step * batch_tokens,
            tokens_per_s=batch_tokens / (time.perf_counter() - start),
            quantised=QuantisedShares.of(matrices),
            router=balances,
            warnings=self._alarm.look(balances, routings, choices_of_a_step(self.config)),
        )
        return report, matrices, routings

    def _log(self, report: StepReport, routings: Sequence[LayerRouting]) -> OSError | None:
        """Write a step down; what the disk said, if it refused. The keeper has the lines then."""
        trouble = None
        lines = {METRICS: report.as_dict()}
        if routings:
            lines[ROUTER] = {"step": report.step, "layers": [layer.as_dict() for layer in routings]}
        for name, line in lines.items():
            try:
                self.keeper.log(name, line)
            except OSError as error:
                trouble = error
        if self.config.training.tensorboard:
            try:
                self._event_file(report.step - 1).add(lines[METRICS], routings)
            except OSError as error:
                trouble = trouble or error
        return trouble

    def _event_file(self, step: int) -> EventFile:
        """This sitting's, which goes on after `step` if it is made now."""
        self._events = self._events or EventFile(self.run, step=step)
        return self._events

    def _settings(self) -> AdamWSettings:
        """The optimiser's, for the step about to be made."""
        return adamw_settings(
            self.step, total_steps=self.config.training.steps, optimizer=self.config.optimizer
        )

    def _next_windows(self) -> list[IntArray]:
        """The micro-batches of the step about to be made, [B, T+1] each.

        Raises TrainingFailure: a token id is none of the model's.
        """
        tokens_BT1 = self._batches.batch(self.step)
        known = (tokens_BT1 >= 0) & (tokens_BT1 < self.config.model.vocab_size)
        if not known.all():
            place = tuple(int(index) for index in np.argwhere(~known)[0])
            raise TrainingFailure(
                f"step {self.step + 1}: the batch holds token id {tokens_BT1[place]} at {list(place)}, "
                f"beyond the model's vocab_size {self.config.model.vocab_size}; {self.keeper.kept()}"
            )
        return np.split(tokens_BT1, self.config.training.gradient_accumulation_steps)

    # ---- when a number is not finite -------------------------------------------------------------

    def _failure(self, when: str, result: StepResult, windows: Sequence[IntArray]) -> TrainingFailure:
        """Why the next step cannot be made. Its batch and the state are put aside for `replay`.

        when: it was found.
        No checkpoint is written: one of this state would be one that no run goes on from.
        """
        learner = self.learner
        found = diagnose(learner, result, [Batch.of(part) for part in windows], ops=self.ops)
        record = FailureRecord(
            step=self.step + 1, settings=self._settings(), losses=result.losses._asdict(), fault=found
        )
        directory = self.run / FAILURE
        try:
            if directory.exists():
                remove_directory(directory)
            parameters = learner.parameters.to_host(self.ops)
            moments = learner.moments.to_host(self.ops)
            save_failure(directory, parameters, moments, windows, record)
            aside = f"`mhmoe-np replay {directory}` repeats it"
        except OSError as error:
            aside = f"{directory} could not be written: {error.strerror}"
        return TrainingFailure(
            f"{when}: not finite: {found}; {aside}; {self.keeper.kept()} and a lower "
            "--set learning_rate=... or longer warmup_steps=..."
        )

    def _check_state(self) -> None:
        """Make sure that the state about to be saved is one that a run can go on from.

        Every number must be finite, and the next loss too: weights may be so large that nothing can be
        computed with them.

        Raises TrainingFailure: they are not.
        """
        sum_3 = self.ops.zeros((3,), np.float64)
        for i, group in enumerate((self.learner.parameters, *self.learner.moments)):
            self.ops.add_sum_of_squares(group.flat_P, sum_3[i : i + 1])
        windows = self._next_windows()
        result = loss(self.learner.model, [Batch.of(part) for part in windows], ops=self.ops)
        if not (result.is_finite and np.isfinite(self.ops.to_host(sum_3)).all()):
            raise self._failure(f"after step {self.step}", result, windows)

    def _save(self, matrices: Mapping[str, MatrixCounts], trouble: OSError | None) -> None:
        """Keep the step that was just made; matrices: its quantised ones; trouble: the disk's, with it.

        Raises TrainingFailure: the disk is full or refuses, or the weights are good for nothing.
        """
        self._check_state()
        if self._events is not None:
            try:
                self._events.flush()
            except OSError as error:
                trouble = trouble or error
        lines = {}
        if matrices:
            values = {name: counts._asdict() for name, counts in matrices.items()}
            lines[QUANTIZATION] = {"step": self.step, "matrices": values}
        self.keeper.save(lines, trouble=trouble)


class _BrokenOff(Exception):
    """A signal came while the held-out text was scored."""


def _beginning(config: RunConfig, on_progress: OnProgress) -> TrainingCheckpoint:
    """Step 0, with random weights."""
    parameters = Parameters(config.model, np.float32)
    initialise(parameters, config.training.seed, on_progress)
    state = TrainerState(step=0, config=config, logs={})
    return TrainingCheckpoint(parameters, Moments.zeros(config.model, np.float32), state)
