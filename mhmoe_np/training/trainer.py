"""The training loop: batches in, weights out, and nothing lost but the current step.

A batch is a pure function of (seed, step) and nothing else is random, so a resumed run is the same
run, bit for bit.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np

from mhmoe_np.checkpoints.checkpoint import (
    CHECKPOINTS,
    TrainerState,
    checkpoints_of,
    load_training_checkpoint,
    save_training_checkpoint,
)
from mhmoe_np.data.batches import Batches
from mhmoe_np.data.tokenizer import load_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.layers.balance import RouterStatistics
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.sums import Losses
from mhmoe_np.model.weights import MatrixCounts
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.storage.files import remove_directory, remove_leftovers
from mhmoe_np.training.run_folder import METRICS, QUANTIZATION, TOKENIZER, cut_lines, training_store
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner


class TrainingFailure(Exception):
    """Training cannot go on: the message says at which step, why, and what was kept."""


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

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON has it; what the model does not have is left out."""
        values = self._asdict()
        quantised = values.pop("quantised")
        return values if quantised is None else {**values, "quantised": quantised._asdict()}


class Trainer:
    """A run in a run folder, from its last checkpoint or from the start.

    Attributes:
        run: the folder.
        config: what the run does.
        ops: the backend that it runs on.
        learner: the model as trained so far, and what training it needs.
    """

    def __init__(self, run: Path, config: RunConfig, ops: Operations) -> None:
        """Open the run's data and state.

        Raises UserError: the data or the last checkpoint is damaged or of another configuration.
        """
        self.run, self.config, self.ops = run, config, ops
        self._tokenizer = load_tokenizer(run / TOKENIZER)
        self._batches = Batches(
            training_store(run).token_W,
            sequence_length=config.training.sequence_length,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
        )
        (run / CHECKPOINTS).mkdir(exist_ok=True)
        remove_leftovers(run / CHECKPOINTS)
        self.learner = self._restored()

    def _restored(self) -> Learner:
        model = self.config.model
        checkpoints = checkpoints_of(self.run)
        if not checkpoints:
            parameters = Parameters(model, np.float32)
            initialise(parameters, self.config.training.seed)
            return Learner(parameters, Moments.zeros(model, np.float32), updates=0, ops=self.ops)
        parameters, moments, state = load_training_checkpoint(checkpoints[-1], model)
        if state.config_sha256 != self.config.identity():
            raise UserError(f"{checkpoints[-1]}: was made with another configuration than {self.run}'s")
        return Learner(parameters, moments, updates=state.step, ops=self.ops)

    @property
    def step(self) -> int:
        """Updates made."""
        return self.learner.updates

    @property
    def finished(self) -> bool:
        """Whether every step was made."""
        return self.step >= self.config.training.steps

    def train(self, on_step: Callable[[StepReport], None] | None = None) -> int | None:
        """Go on to the last step; return the signal that ended it early, if one did.

        on_step: called with each step's report.
        SIGINT and SIGTERM end the run after the current step, with a checkpoint; only the main thread
        can catch them, so call it there.

        Raises TrainingFailure: the loss is not finite; UserError: a file cannot be written.
        """
        for name in (METRICS, QUANTIZATION):
            cut_lines(self.run / name, self.step)
        every = self.config.training.checkpoint_every
        with _signals() as received, (self.run / METRICS).open("a", encoding="utf-8") as metrics:
            while not self.finished:
                report, matrices = self._train_step()
                metrics.write(json.dumps(report.as_dict()) + "\n")
                metrics.flush()
                if on_step is not None:
                    on_step(report)
                if self.step % every == 0 or self.finished or received:
                    self._log_matrices(matrices)
                    self.save()
                if received:
                    return received[0]
        return None

    def _log_matrices(self, matrices: Mapping[str, MatrixCounts]) -> None:
        """Add this step's quantised matrices to the run's `quantization.jsonl`, one line."""
        if not matrices:
            return
        values = {name: counts._asdict() for name, counts in matrices.items()}
        with (self.run / QUANTIZATION).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "matrices": values}) + "\n")

    def _train_step(self) -> tuple[StepReport, dict[str, MatrixCounts]]:
        start = time.perf_counter()
        training = self.config.training
        tokens_BT1 = self._batches.batch(self.step)
        parts = np.split(tokens_BT1, training.gradient_accumulation_steps)
        settings = adamw_settings(
            self.step, total_steps=training.steps, optimizer=self.config.optimizer
        )
        result = self.learner.step([Batch.of(part) for part in parts], settings)
        if not result.is_finite:
            self._fail(result.losses)
        losses, statistics, norm, matrices = result
        batch_tokens = training.batch_size * training.sequence_length
        report = StepReport(
            step=self.step,
            **losses._asdict(),
            learning_rate=settings.learning_rate,
            gradient_norm=norm,
            dropped=sum(layer.dropped for layer in statistics),
            busiest_expert=max((_busiest(layer) for layer in statistics), default=1.0),
            tokens=self.step * batch_tokens,
            tokens_per_s=batch_tokens / (time.perf_counter() - start),
            quantised=QuantisedShares.of(matrices),
        )
        return report, matrices

    def _fail(self, losses: Losses) -> None:
        """Keep the state before the step that went wrong, and say where it did."""
        suspects = {"weight": self.learner.parameters, "gradient": self.learner.gradient}
        first = next(
            (
                f"{kind} {name}"
                for kind, group in suspects.items()
                for name, tensor in group.to_host(self.ops).tensors.items()
                if not np.isfinite(tensor).all()
            ),
            "the loss",
        )
        kept = self.save()
        raise TrainingFailure(
            f"step {self.step + 1}: loss {losses.loss}; first non-finite: {first}; the state before "
            f"this step is {kept} (its batch follows from seed and step); "
            "lower optimizer.learning_rate or raise optimizer.warmup_steps"
        )

    def save(self) -> Path:
        """Write a checkpoint of the current step, unless there is one, and drop the oldest.

        Raises UserError: the disk is full or refuses; earlier checkpoints stay.
        """
        directory = self.run / CHECKPOINTS / f"step-{self.step:08d}"
        if directory.exists():
            return directory
        state = TrainerState(step=self.step, config_sha256=self.config.identity())
        try:
            parameters = self.learner.parameters.to_host(self.ops)
            moments = self.learner.moments.to_host(self.ops)
            save_training_checkpoint(directory, parameters, self._tokenizer, moments, state)
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be written: {error.strerror}; free some space and continue "
                "with --resume auto: earlier checkpoints are whole"
            ) from None
        for old in checkpoints_of(self.run)[: -self.config.training.keep_checkpoints]:
            remove_directory(old)
        return directory


def _busiest(statistics: RouterStatistics) -> float:
    choice_E = statistics.choice_E
    return float(choice_E.max() * len(choice_E) / max(1, choice_E.sum()))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one acts as it always did."""
    received: list[int] = []
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in previous.items():
            signal.signal(kind, handler)

    def note(kind: int, _frame: FrameType | None) -> None:
        received.append(kind)
        restore()

    for kind in previous:
        signal.signal(kind, note)
    try:
        yield received
    finally:
        restore()
