"""The held-out text's scores while a run trains, and which step was the best.

What `validation.jsonl` holds is all there is to know: a run that goes on reads it, and scores no step
again whose line is there.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import best_models_of, step_of
from mhmoe_np.data.tokenised_text import TokenisedText, tokenise_text
from mhmoe_np.inference.evaluate import DomainScore, evaluate
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.training.log_file import LogLines
from mhmoe_np.training.run_folder import VALIDATION_LOG, held_out_domains


class ValidationReport(NamedTuple):
    """One scoring of all domains: a line of `validation.jsonl`."""

    step: int  # updates made before it
    scores: dict[str, DomainScore]

    @property
    def mean_nll(self) -> float:
        """Nats a token, over the tokens of all domains: the lowest is the best."""
        scores = self.scores.values()
        return sum(score.nll for score in scores) / sum(score.tokens for score in scores)

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON has it."""
        domains = {name: score.as_dict() for name, score in self.scores.items()}
        return {"step": self.step, "mean_nll": self.mean_nll, "domains": domains}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The report of a line.

        Raises KeyError, TypeError or AttributeError: it is none.
        """
        domains = values["domains"].items()
        return cls(values["step"], {name: DomainScore.from_dict(score) for name, score in domains})


class Validation:
    """A run's validations, made and to be made.

    Attributes:
        reports: those made, in order; without those whose lines are damaged.
    """

    def __init__(self, run: Path, *, every: int) -> None:
        """Take up what the run's log has; every: steps between two, 0: none is made."""
        self._run, self._every = run, every
        self.reports = _read(run / VALIDATION_LOG)

    def of_step(self, step: int) -> ValidationReport | None:
        """The validation of this step, if it was made."""
        return next((report for report in self.reports if report.step == step), None)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether the model of this step is to be scored; last: no step comes after it."""
        due = self._every > 0 and step > 0 and (last or step % self._every == 0)
        return due and self.of_step(step) is None

    def is_best(self, report: ValidationReport) -> bool:
        """Whether no model that is still kept scored as well."""
        kept = {step_of(path) for path in best_models_of(self._run)}
        others = [other.mean_nll for other in self.reports if other.step in kept]
        return report.mean_nll < min(others, default=float("inf"))


class HeldOutText:
    """A run's held-out text, by domain; encoded once, when it is first asked for."""

    def __init__(self, run: Path, tokenizer: Tokenizer) -> None:
        """Of the run in this folder, with its tokenizer."""
        self._run, self._tokenizer = run, tokenizer
        self._texts: list[TokenisedText] = []

    def texts(self, on_progress: OnProgress = unseen) -> list[TokenisedText]:
        """The tokens of each domain.

        Raises UserError, OSError: see `tokenise_text`.
        """
        if not self._texts:
            self._texts = [
                tokenise_text(name, file, self._tokenizer, on_progress=on_progress)
                for name, file in held_out_domains(self._run).items()
            ]
        return self._texts

    def scores(
        self, model: Model, *, ops: Operations, on_progress: OnProgress = unseen
    ) -> dict[str, DomainScore]:
        """The scores of each domain.

        Raises UserError: a domain's text is a single token, or the model's numbers overflow; or as
        `texts`.
        """
        return {
            text.name: evaluate(model, text, ops=ops, on_progress=on_progress)
            for text in self.texts(on_progress)
        }


def _read(path: Path) -> list[ValidationReport]:
    found = []
    for line in LogLines(path):
        with suppress(KeyError, TypeError, AttributeError):  # damaged, of which the log's keeper tells
            found.append(ValidationReport.from_dict(line))
    return found
