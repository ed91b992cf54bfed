"""What a run ends with: the scores of its held-out text, and a sample."""

from __future__ import annotations

from typing import NamedTuple

from mhmoe_np.inference.evaluate import DomainScore, scores_as_dict
from mhmoe_np.inference.generate import generate
from mhmoe_np.inference.protocols import Protocol
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.storage.checksums import reseal, unseal
from mhmoe_np.storage.files import write_atomically, write_json
from mhmoe_np.training.run_folder import EVALUATION
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
    write_evaluation(trainer, result)
    return result


def score_run(trainer: Trainer, on_progress: OnProgress = unseen) -> RunResult:
    """The scores of the held-out text, and a sample; the last step's validation is not made again.

    Raises UserError: a domain's held-out text is a single token, or the model's numbers overflow.
    """
    model, ops, config = trainer.learner.model, trainer.ops, trainer.config
    tokenizer = trainer.tokenizer
    validated = trainer.validation.of_step(trainer.step)
    if validated is not None:
        scores = validated.scores
    else:
        scores = trainer.held_out.scores(model, ops=ops, on_progress=on_progress)
    pieces = generate(
        model,
        tokenizer,
        "",
        max_new_tokens=min(SAMPLE_TOKENS, config.model.max_position_embeddings - 1),
        sampling=Sampling(temperature=0.8, top_p=0.95, seed=config.training.seed),
        joined=False,  # a first run would compile for half a minute what saves a second
        ops=ops,
    )
    return RunResult(scores, "".join(pieces))


def write_evaluation(trainer: Trainer, result: RunResult) -> None:
    """Write the scores to the run's `evaluation.json`.

    Raises OSError: the disk is full or refuses; then the run counts as not evaluated.
    """
    run = trainer.run
    protocol = Protocol("disjoint", trainer.config.model.max_position_embeddings)
    values = scores_as_dict(result.scores, protocol, trainer.tokenizer)
    unseal(run, EVALUATION)
    write_atomically(run / EVALUATION, lambda path: write_json(path, values))
    reseal(run, EVALUATION)
