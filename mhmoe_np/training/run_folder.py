"""A run folder: what a training run reads and leaves behind, and where.

    config.toml        the resolved configuration, every default spelled out
    environment.json   versions, processor, threads
    tokenizer.json     data/train.bin, data/train.json (the token store)
    validation/        each domain's held-out documents, a JSON line each
    metrics.jsonl      one object a step
    quantization.jsonl with BitNet: at every checkpoint, each quantised matrix's scale and shares
    checkpoints/       step-00000100/ ...
    evaluation.json    the final scores

Everything above metrics.jsonl is made in a temporary folder and renamed: a run folder is whole or
absent.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from mhmoe_np.data.documents import Domain, chosen_domains, read_domain
from mhmoe_np.data.split import split_documents
from mhmoe_np.data.store import TokenStore, open_store, write_store
from mhmoe_np.data.tokenizer import (
    id_count,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from mhmoe_np.errors import UserError
from mhmoe_np.settings.run import RunConfig, Tables, read_toml
from mhmoe_np.storage.files import write_directory_atomically, write_json, write_text

CONFIG, ENVIRONMENT, TOKENIZER = "config.toml", "environment.json", "tokenizer.json"
METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
QUANTIZATION = "quantization.jsonl"
STORE, VALIDATION = "data/train", "validation"


def is_run_folder(path: Path) -> bool:
    """Whether `path` holds a run."""
    return (path / CONFIG).is_file()


def read_run_tables(run: Path) -> Tables:
    """The resolved configuration of a run folder.

    Raises UserError: it holds none, or a damaged one.
    """
    return read_toml(run / CONFIG)


def create_run_folder(path: Path, config: RunConfig, *, threads: int, backend: str) -> None:
    """Read the text, split it, train or load the tokenizer, and write all that a run starts from.

    Raises UserError: `path` exists, or the text or the tokenizer is unfit.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; choose another --out, or continue with --resume auto")
    domains = chosen_domains(config.data.paths)
    parts = {
        domain.name: split_documents(
            domain.documents,
            fraction=config.data.validation_fraction,
            seed=config.training.seed,
        )
        for domain in domains
    }
    training = [document for kept, _ in parts.values() for document in kept]
    vocab_size = config.model.vocab_size
    if config.data.tokenizer is None:
        tokenizer = train_tokenizer(training, vocab_size=vocab_size)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer)
    if id_count(tokenizer) > vocab_size:
        raise UserError(
            f"{config.data.tokenizer or 'the trained tokenizer'}: has {id_count(tokenizer)} ids, more "
            f"than model.vocab_size {vocab_size}; raise it"
        )

    def fill(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / VALIDATION).mkdir()
        write_store(folder / STORE, training, tokenizer, name="train")
        for name, (_, held_out) in parts.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held_out]
            write_text(folder / VALIDATION / f"{name}.jsonl", "".join(lines))
        save_tokenizer(tokenizer, folder / TOKENIZER)
        write_json(folder / ENVIRONMENT, environment(threads=threads, backend=backend))
        write_text(folder / CONFIG, tomli_w.dumps(_without_none(config.model_dump())))

    write_directory_atomically(path, fill)


def _without_none(tables: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a key whose value is None is left out, and reads as None again."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in tables.items()
    }


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


def environment(*, threads: int, backend: str) -> dict[str, Any]:
    """What the run was started with, for whoever reads its figures later."""
    packages = ("mhmoe-np", "numpy", "numba", "scipy", "tokenizers", "safetensors")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": backend,
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
