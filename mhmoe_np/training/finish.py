"""What a run ends with: the scores of its held-out text, and a sample."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mhmoe_np.data.store import TOKENIZER
from mhmoe_np.data.tokenizer import load_tokenizer
from mhmoe_np.inference.evaluate import DomainScore, evaluate
from mhmoe_np.inference.generate import Sampling, generate
from mhmoe_np.storage.checksums import reseal, unseal
from mhmoe_np.storage.files import write_atomically, write_json
from mhmoe_np.training.run_folder import EVALUATION, validation_domains
from mhmoe_np.training.trainer import Trainer

SAMPLE_TOKENS = 120


class RunResult(NamedTuple):
    """How good the trained model is, and how it writes."""

    scores: dict[str, DomainScore]  # of each domain's held-out text
    sample: str


def finish_run(trainer: Trainer) -> RunResult:
    """Score the held-out text, let the model write a sample, and write `evaluation.json`.

    Raises UserError: see `score_run`; OSError: the file cannot be written.
    """
    result = score_run(trainer)
    write_evaluation(trainer.run, result)
    return result


def score_run(trainer: Trainer) -> RunResult:
    """The scores of the held-out text, and a sample.

    Raises UserError: a domain's held-out text is a single token, or the model's numbers overflow.
    """
    model, ops, config = trainer.learner.model, trainer.ops, trainer.config
    tokenizer = load_tokenizer(trainer.run / TOKENIZER)
    scores = {
        domain.name: evaluate(model, domain, tokenizer, ops=ops)
        for domain in validation_domains(trainer.run)
    }
    pieces = generate(
        model,
        tokenizer,
        "",
        max_new_tokens=min(SAMPLE_TOKENS, config.model.max_position_embeddings - 1),
        sampling=Sampling(temperature=0.8, top_p=0.95, seed=config.training.seed),
        ops=ops,
    )
    return RunResult(scores, "".join(pieces))


def write_evaluation(run: Path, result: RunResult) -> None:
    """Write the scores to the run's `evaluation.json`.

    Raises OSError: the disk is full or refuses; then the run counts as not evaluated.
    """
    values = {name: score.as_dict() for name, score in result.scores.items()}
    unseal(run, EVALUATION)
    write_atomically(run / EVALUATION, lambda path: write_json(path, {"domains": values}))
    reseal(run, EVALUATION)
