"""From a configuration to a run folder: text read, split, tokenised, and written down."""

from __future__ import annotations

import shutil
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
from mhmoe_np.data.prepare import (
    PreparationSettings,
    is_unfinished,
    prepare_text,
)
from mhmoe_np.data.read_file import read_pieces
from mhmoe_np.data.sources import Source, find_sources, is_token_file
from mhmoe_np.data.store import (
    DATA,
    HEADER,
    TOKENIZER,
    VALIDATION,
    StoreHeader,
    check_store,
    is_store,
    read_header,
    sha256_of,
)
from mhmoe_np.data.tokenised_text import tokenise_documents
from mhmoe_np.data.tokenizer import (
    check_saves,
    id_count,
    load_tokenizer,
    tokenizer_sha256,
)
from mhmoe_np.errors import Taken, UserError
from mhmoe_np.inference.evaluate import check_scores
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.storage.checksums import seal
from mhmoe_np.storage.files import new_locked_directory, write_json, write_text
from mhmoe_np.storage.lock import Lock
from mhmoe_np.storage.reading import check_regular
from mhmoe_np.training.environment import environment
from mhmoe_np.training.run_folder import (
    ELSEWHERE,
    ENVIRONMENT,
    RUN_CONFIG,
    Elsewhere,
    batches_of,
    prepared_files,
    stored_tokens,
)

LEAST_TO_SHARE = 1 << 25  # bytes of text that are worth other processes
ENOUGH_TO_SCORE = 1 << 10  # characters


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
    on_progress: OnProgress = unseen,
) -> Lock:
    """Read the text, split it, train or load the tokenizer, and write all that a run starts from.

    threads, ops: what the run is started with, for the record; so many processes encode large text.
    start: where the weights of step 0 are not random ones; its tokenizer is the run's, too, unless the
    configuration names one.
    on_progress: is told how far the text is prepared.

    What is done of a large text stays when it is interrupted: the next call for `path` goes on with it.

    Returns the folder's lock: nobody else writes there while it is held.

    Raises UserError: `path` exists, or the text or the tokenizer is unfit; then nothing is left behind.
    """
    if path.exists():
        raise Taken(f"{path}: exists already; choose another --out, or continue with --resume auto")
    store = given_store(config)
    sources = [] if store else find_sources(config.data.paths, config.data.domains)
    given = _given_tokenizer(config, start)

    def fill(folder: Path) -> None:
        if store is not None:
            header = _refer(folder, store, on_progress)
        else:
            header = _prepare(folder, sources, config, given, threads, on_progress)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        _check_tokenizer(tokenizer, given, config, source=store)
        # Refused now and not after the last step: a text that is too short to train on, or to score.
        sha256 = tokenizer_sha256(tokenizer)
        batches_of(stored_tokens(store or folder, tokenizer_sha256=sha256), config)
        for domain in header.domains:
            _check_scores(folder / VALIDATION / f"{domain.name}.jsonl", tokenizer, config)
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

    return new_locked_directory(path, fill, is_unfinished=is_unfinished)


def given_store(config: RunConfig) -> Path | None:
    """The store that a run's only path leads to; None: its paths are of text.

    Raises UserError: a store is given beside something else.
    """
    stores = [Path(path) for path in config.data.paths if is_store(Path(path))]
    if not stores:
        return None
    if len(config.data.paths) > 1 or config.data.domains:
        raise UserError(f"{stores[0]}: is a store; give it alone, or prepare one store of all the text")
    return stores[0]


def text_size(config: RunConfig) -> int:
    """Bytes of UTF-8 of a run's text, about: a text file's are the file's; others are read.

    Raises UserError: the text is not there, or is damaged.
    """
    store = given_store(config)
    if store is not None:
        return sum(domain.size for domain in read_header(store).domains)
    size = 0
    for source in find_sources(config.data.paths, config.data.domains):
        for file in source.files:
            if is_token_file(file) or file.suffix.lower() == ".txt":
                size += check_regular(file).st_size
            else:
                size += sum(piece.size for piece in read_pieces(file, text_key=config.data.text_key))
    return size


def _given_tokenizer(config: RunConfig, start: InitialWeights | None) -> Tokenizer | None:
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_saves(tokenizer, config.data.tokenizer)
        return tokenizer
    return None if start is None else start.tokenizer


def preparation_settings(config: RunConfig) -> PreparationSettings:
    """What a run's text is prepared with."""
    return PreparationSettings(
        vocab_size=config.model.vocab_size,
        validation_fraction=config.data.validation_fraction,
        seed=config.training.seed,
        text_key=config.data.text_key,
        weights=config.data.weights,
    )


def _prepare(
    folder: Path,
    sources: list[Source],
    config: RunConfig,
    tokenizer: Tokenizer | None,
    threads: int,
    on_progress: OnProgress,
) -> StoreHeader:
    if tokenizer is not None:
        _check_vocabulary(tokenizer, config, config.data.tokenizer or TOKENIZER)
    size = sum(source.size for source in sources)
    return prepare_text(
        folder,
        sources,
        preparation_settings(config),
        tokenizer=tokenizer,
        workers=threads if size >= LEAST_TO_SHARE else 1,
        on_progress=on_progress,
    )


def _refer(folder: Path, store: Path, on_progress: OnProgress) -> StoreHeader:
    """Make a run of a store elsewhere: its tokenizer and its held-out text come along."""
    header = check_store(store, on_progress)
    (folder / DATA).mkdir()
    (folder / VALIDATION).mkdir()
    shutil.copyfile(store / TOKENIZER, folder / TOKENIZER)
    for domain in header.domains:
        name = f"{domain.name}.jsonl"
        shutil.copyfile(store / VALIDATION / name, folder / VALIDATION / name)
    sha256 = sha256_of(store / DATA / HEADER)
    found = Elsewhere(store=str(store.resolve()), sha256=sha256)
    write_json(folder / ELSEWHERE, found.model_dump())
    return header


def _check_tokenizer(
    tokenizer: Tokenizer, given: Tokenizer | None, config: RunConfig, *, source: Path | None
) -> None:
    if given is not None and tokenizer_sha256(given) != tokenizer_sha256(tokenizer):
        raise UserError(
            f"{source}: was made with another tokenizer than {config.data.tokenizer or '--init'}"
            " has; prepare the text with that one"
        )
    _check_vocabulary(
        tokenizer, config, str(source or config.data.tokenizer or "the trained tokenizer")
    )


def _check_vocabulary(tokenizer: Tokenizer, config: RunConfig, source: str) -> None:
    if id_count(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"{source}: has {id_count(tokenizer)} ids, more than model.vocab_size "
            f"{config.model.vocab_size}; raise it"
        )


def _check_scores(path: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Make sure that a domain's held-out text can be scored, by its beginning."""
    beginning: list[str] = []
    for piece in read_pieces(path):
        assert isinstance(piece.content, str)
        beginning.append(piece.content)
        if sum(map(len, beginning)) >= ENOUGH_TO_SCORE:
            break
    text = tokenise_documents(path.stem, beginning, tokenizer)
    check_scores(text, vocab_size=config.model.vocab_size)


def _without_none(tables: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a key whose value is None is left out, and reads as None again."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in tables.items()
    }
