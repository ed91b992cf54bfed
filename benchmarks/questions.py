"""What users asked and the papers do not say: one change of a small preset at a time, over three seeds.

    python -m benchmarks.questions [--only residual gates biases precision dropping] [--presets ...]
                                   [--seeds 0 1 2] [--steps N] [--threads N] [--out runs/questions]
                                   [--blas own|openblas|mkl] [--json]

Trains each preset on the embedded corpus as it is and changed, and scores the held-out text. Both runs
of a pair have the same seed: the same text is held out, the batches are the same, and tensors of one
name start from the same values. Finished and interrupted runs in the folder are taken up where they
are; `questions.json` there has what came out. docs/questions.md asks and answers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bitnet import mhmoe
from benchmarks.machines import add_blas_option, machine, use_blas
from mhmoe_np.checkpoints.checkpoint import find_checkpoint, load_checkpoint_tokenizer, load_model
from mhmoe_np.inference.evaluate import check_scores
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.loss import Batch, loss
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.presets import RUN_PRESETS
from mhmoe_np.storage.files import write_atomically, write_json
from mhmoe_np.training.validation import HeldOutText

MULTI_HEAD = ("small-mh-moe-2", "small-mh-moe-3")
AT_ONCE = (1, 4, 16)  # windows that share an expert's capacity


class Question(NamedTuple):
    """Presets, and the settings that are changed in them, one at a time."""

    presets: tuple[str, ...]
    changes: tuple[str, ...]


QUESTIONS = {
    "residual": Question(MULTI_HEAD, ("moe_residual=true",)),
    "gates": Question(("small-fine-grained-smoe", *MULTI_HEAD), ("norm_topk_prob=false",)),
    "biases": Question(MULTI_HEAD, ("moe_projection_bias=true",)),
    "precision": Question(
        tuple(f"{preset}-bitnet" for preset in MULTI_HEAD),
        ("quantize_moe_projections=true", "use_sub_norm=false"),
    ),
    "dropping": Question(MULTI_HEAD, ("moe_capacity_factor=1.0",)),
}
PRESETS = sorted({preset for question in QUESTIONS.values() for preset in question.presets})


class Runs(NamedTuple):
    """Where the runs are, and what they have in common."""

    folder: Path
    steps: int | None  # None: the preset's
    threads: int | None

    def trained(self, preset: str, change: str, seed: int) -> Path:
        """The folder of a finished run."""
        run = self.folder / "-".join(filter(None, (preset, change, f"seed-{seed}")))
        options: list[object] = ["--preset", preset, "--seed", seed, "--out", run]
        for name, value in (("--set", change), ("--steps", self.steps), ("--threads", self.threads)):
            options += [name, value] if value else []
        mhmoe("train", *options, "--resume", "auto")
        return run


def nll_of(run: Path) -> float:
    """Mean NLL over all tokens of the held-out text."""
    domains = json.loads((run / "evaluation.json").read_text())["domains"].values()
    nll: float = sum(score["nll"] for score in domains) / sum(score["tokens"] for score in domains)
    return nll


def compare(runs: Runs, preset: str, change: str, seeds: list[int]) -> dict[str, Any]:
    """Perplexities seed by seed, as the preset is and changed, and by how much the second is higher."""
    plain, changed = (
        [nll_of(runs.trained(preset, setting, seed)) for seed in seeds] for setting in ("", change)
    )
    percent = [100 * math.expm1(after - before) for before, after in zip(plain, changed, strict=True)]
    return {
        "preset": preset,
        "change": change,
        "token_ppl": [round(math.exp(nll), 3) for nll in plain],
        "token_ppl_changed": [round(math.exp(nll), 3) for nll in changed],
        "percent_higher": [round(share, 3) for share in percent],
        "mean_percent_higher": round(statistics.mean(percent), 3),
    }


def windows_of(run: Path, model: Model) -> np.ndarray[Any, Any]:
    """The whole windows of the held-out text, [windows, T+1]."""
    tokenizer, length = (
        load_checkpoint_tokenizer(find_checkpoint(run)),
        model.config.max_position_embeddings,
    )
    found = []
    for text in HeldOutText(run, tokenizer).texts():
        check_scores(text, vocab_size=model.config.vocab_size)
        token_W = text.token_W
        starts = range(0, len(token_W) - length, length)
        found += [token_W[start : start + length + 1] for start in starts]
    return np.stack(found)


def drop_at_evaluation(run: Path, ops: Operations) -> dict[str, Any]:
    """Perplexity of the held-out windows without capacity, and with it by how many go at once."""
    model = load_model(find_checkpoint(run), np.float32, ops=ops)
    windows = windows_of(run, model)

    def score(model: Model, rows: int) -> dict[str, float]:
        batches = [Batch.of(windows[first : first + rows]) for first in range(0, len(windows), rows)]
        result = loss(model, batches, ops=ops)
        choices = sum(int(layer.choice_E.sum()) for layer in result.statistics)
        dropped = sum(layer.dropped for layer in result.statistics)
        return {
            "token_ppl": round(math.exp(result.losses.nll), 3),
            "dropped_share": round(dropped / choices, 5),
        }

    dropless = model.config.model_copy(update={"moe_capacity_factor": None})
    return {
        "dropless": score(model._replace(config=dropless), max(AT_ONCE)),
        **{f"{rows} at once": score(model, rows) for rows in AT_ONCE},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/questions"))
    parser.add_argument("--json", action="store_true")
    add_blas_option(parser)
    arguments = parser.parse_args()
    use_blas(arguments.blas)
    runs = Runs(arguments.out, arguments.steps, arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        for preset in filter(arguments.presets.__contains__, QUESTIONS[name].presets):
            for change in QUESTIONS[name].changes:
                row = {"question": name, **compare(runs, preset, change, arguments.seeds)}
                if name == "dropping":
                    ops = load_operations("numba")
                    row["at_evaluation"] = [
                        drop_at_evaluation(runs.trained(preset, change, seed), ops)
                        for seed in arguments.seeds
                    ]
                steps = arguments.steps or RUN_PRESETS[preset]["training"]["steps"]
                rows.append({**row, "steps": steps, "seeds": arguments.seeds})
    blas = load_operations("numba").blas()
    assert blas is not None
    results = {"machine": machine(), "blas": blas._asdict(), "results": rows}
    write_atomically(arguments.out / "questions.json", partial(write_json, value=results))
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print("token perplexity of the held-out text, by seed; how much higher it is when changed, in %")
    for row in rows:
        pairs = zip(row["token_ppl"], row["token_ppl_changed"], strict=True)
        by_seed = "".join(f"{before:>10.2f} / {after:.2f}" for before, after in pairs)
        change = f"{row['preset']} {row['change']}"
        print(f"{change:52s}{by_seed}{row['mean_percent_higher']:>+9.2f}")
        for seed, scores in zip(row["seeds"], row.get("at_evaluation", []), strict=False):
            shown = ", ".join(
                f"{name} {score['token_ppl']:.2f} ({100 * score['dropped_share']:.1f} % dropped)"
                for name, score in scores.items()
            )
            print(f"  seed {seed}: {shown}")


if __name__ == "__main__":
    main()
