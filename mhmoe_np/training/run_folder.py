"""A run folder: what a training run reads and leaves behind, and where.

    config.toml        the resolved configuration, every default spelled out
    environment.json   versions, processor, threads
    tokenizer.json     data/train.bin, data/train.json (the token store)
    validation/        each domain's held-out documents, a JSON line each
    metrics.jsonl      one object a step
    quantization.jsonl with BitNet: at every checkpoint, each quantised matrix's scale and shares
    checkpoints/       step-00000100/ ...
    evaluation.json    the final scores

Everything above metrics.jsonl is made in a temporary folder and renamed (see `preparation`): a run
folder is whole or absent.
"""

from __future__ import annotations

import json
from pathlib import Path

from mhmoe_np.data.documents import Domain, read_domain
from mhmoe_np.data.store import TokenStore, open_store
from mhmoe_np.data.tokenizer import load_tokenizer, tokenizer_sha256
from mhmoe_np.settings.run import Tables, read_toml
from mhmoe_np.storage.files import write_text

RUN_CONFIG, ENVIRONMENT, TOKENIZER = "config.toml", "environment.json", "tokenizer.json"
METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
QUANTIZATION = "quantization.jsonl"
STORE, VALIDATION = "data/train", "validation"


def is_run_folder(path: Path) -> bool:
    """Whether `path` holds a run."""
    return (path / RUN_CONFIG).is_file()


def is_evaluated(run: Path) -> bool:
    """Whether the run's final scores were written."""
    return (run / EVALUATION).exists()


def read_run_tables(run: Path) -> Tables:
    """The resolved configuration of a run folder.

    Raises UserError: it holds none, or a damaged one.
    """
    return read_toml(run / RUN_CONFIG)


def training_store(run: Path) -> TokenStore:
    """The run's training tokens.

    Raises UserError: missing, damaged, or made with another tokenizer.
    """
    sha256 = tokenizer_sha256(load_tokenizer(run / TOKENIZER))
    return open_store(run / STORE, tokenizer_sha256=sha256)


def validation_domains(run: Path) -> list[Domain]:
    """The run's held-out text, by domain."""
    order = sorted((run / VALIDATION).glob("*.jsonl"))
    return [read_domain(path.stem, path) for path in order]


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of steps beyond `step`, and a torn last one: they are about to come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    write_text(path, "".join(kept))
