"""From a configuration to a run folder: text read, split, tokenised, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import CHECKPOINTS
from mhmoe_np.checkpoints.training_state import (
    TrainerState,
    TrainingCheckpoint,
    write_training_checkpoint,
)
from mhmoe_np.data.documents import chosen_domains
from mhmoe_np.data.split import split_documents
from mhmoe_np.data.store import write_store
from mhmoe_np.data.tokenizer import (
    MINIMUM_VOCAB_SIZE,
    check_saves,
    id_count,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from mhmoe_np.errors import Taken, UserError
from mhmoe_np.inference.evaluate import scored_text
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.storage.checksums import seal
from mhmoe_np.storage.files import new_locked_directory, write_json, write_text
from mhmoe_np.storage.lock import Lock
from mhmoe_np.training.environment import environment
from mhmoe_np.training.run_folder import (
    ENVIRONMENT,
    RUN_CONFIG,
    STORE,
    TOKENIZER,
    VALIDATION,
    batches_of,
    prepared_files,
)


class InitialWeights(NamedTuple):
    """What another checkpoint gives a run to start from."""

    source: Path
    parameters: Parameters  # float32, on the host
    tokenizer: Tokenizer


def create_run_folder(
    path: Path,
    config: RunConfig,
    start: InitialWeights | None = None,
    *,
    threads: int,
    ops: Operations,
) -> Lock:
    """Read the text, split it, train or load the tokenizer, and write all that a run starts from.

    threads, ops: what the run is started with, for the record.
    start: where the weights of step 0 are not random ones; its tokenizer is the run's, too, unless the
    configuration names one.

    Returns the folder's lock: nobody else writes there while it is held.

    Raises UserError: `path` exists, or the text or the tokenizer is unfit; then nothing is left behind.
    """
    if path.exists():
        raise Taken(f"{path}: exists already; choose another --out, or continue with --resume auto")
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
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_saves(tokenizer, config.data.tokenizer)
    elif start is not None:
        tokenizer = start.tokenizer
    else:
        # No text has more pairs to merge than bytes, and the library makes room for what it is told.
        most = MINIMUM_VOCAB_SIZE + sum(len(document.encode()) for document in training)
        tokenizer = train_tokenizer(training, vocab_size=min(vocab_size, most))
    if id_count(tokenizer) > vocab_size:
        raise UserError(
            f"{config.data.tokenizer or 'the trained tokenizer'}: has {id_count(tokenizer)} ids, more "
            f"than model.vocab_size {vocab_size}; raise it"
        )

    def fill(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / VALIDATION).mkdir()
        store = write_store(folder / STORE, training, tokenizer, name="train")
        # Refused now and not after the last step: a text that is too short to train on, or to score.
        batches_of(store, config)
        for name, (_, held_out) in parts.items():
            documents = [document for document in held_out if document.strip()]
            scored_text(name, documents, tokenizer, vocab_size=vocab_size)
        for name, (_, held_out) in parts.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held_out]
            write_text(folder / VALIDATION / f"{name}.jsonl", "".join(lines))
        save_tokenizer(tokenizer, folder / TOKENIZER)
        write_json(
            folder / ENVIRONMENT,
            environment(threads=threads, ops=ops, init=start and start.source),
        )
        write_text(folder / RUN_CONFIG, tomli_w.dumps(_without_none(config.model_dump())))
        seal(folder, prepared_files(folder))
        (folder / CHECKPOINTS).mkdir()
        if start is not None:
            first = folder / CHECKPOINTS / "step-00000000"
            first.mkdir()
            state = TrainerState(step=0, config=config, logs={})
            moments = Moments.zeros(config.model, np.float32)
            checkpoint = TrainingCheckpoint(start.parameters, moments, state)
            write_training_checkpoint(first, checkpoint, tokenizer)

    return new_locked_directory(path, fill)


def _without_none(tables: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a key whose value is None is left out, and reads as None again."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in tables.items()
    }
