"""A run folder: what a training run reads and leaves behind, and where.

    config.toml        the resolved configuration, every default spelled out
    environment.json   versions, processor, threads
    tokenizer.json     data/, validation/: a token store (see `mhmoe_np.data.store`); where the run was
                       given one, data/elsewhere.json says which. Older runs: data/train.bin, .json
    metrics.jsonl      one object a step
    router.jsonl       with experts: every `router_every` steps, what each router did, head by head
    quantization.jsonl with BitNet: at every checkpoint, each quantised matrix's scale and shares
    validation.jsonl   with eval_every: the held-out text's scores by domain, one object a validation
    checkpoints/       step-00000100/ ..., and best-00000100, the model that scored best
    evaluation.json    the final scores
    report.html        the run as a page, written at its end and by `mhmoe-np report`
    tensorboard/       event files, where they are asked for

    failure/           the step that ended the run, for `mhmoe-np replay`
    checksums.json     of all files above metrics.jsonl, and of evaluation.json

Everything above metrics.jsonl is made in a temporary folder and renamed (see `preparation`): a run
folder is whole or absent. Its writer holds a lock on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from mhmoe_np.data.batches import Batches, Tokens
from mhmoe_np.data.mixture import MixedBatches
from mhmoe_np.data.old_store import open_old_store
from mhmoe_np.data.prepare import check_weights, store_files
from mhmoe_np.data.store import (
    DATA,
    HEADER,
    TOKENIZER,
    VALIDATION,
    Shared,
    TokenStream,
    is_store,
    open_streams,
    read_header,
    sha256_of,
)
from mhmoe_np.data.tokenizer import load_tokenizer, tokenizer_sha256
from mhmoe_np.errors import UserError
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import StrictModel
from mhmoe_np.settings.run import RunConfig, Tables, read_toml
from mhmoe_np.storage.checksums import sealed_files, verify
from mhmoe_np.storage.reading import read_json

RUN_CONFIG, ENVIRONMENT = "config.toml", "environment.json"
METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
ROUTER, REPORT = "router.jsonl", "report.html"
QUANTIZATION, FAILURE = "quantization.jsonl", "failure"
VALIDATION_LOG = "validation.jsonl"
ELSEWHERE, OLD_STORE = "data/elsewhere.json", "data/train"
SET_ASIDE = "damaged-"  # before the name of a checkpoint that is no longer one


def is_run_folder(path: Path) -> bool:
    """Whether `path` holds a run."""
    return (path / RUN_CONFIG).is_file()


def is_evaluated(run: Path) -> bool:
    """Whether the run's final scores were written.

    Raises UserError: the run's checksums are damaged.
    """
    return EVALUATION in sealed_files(run)


def read_run_tables(run: Path) -> Tables:
    """The resolved configuration of a run folder.

    Raises UserError: it holds none, or a damaged one.
    """
    return read_toml(run / RUN_CONFIG)


class Elsewhere(StrictModel):
    """The store that a run was given."""

    store: str  # an absolute path
    sha256: str  # of its header, which has the sha256 of each shard


class TrainingTokens(NamedTuple):
    """A run's training tokens.

    Attributes:
        stream: of all domains, one behind the other.
        domains: name -> a domain's own stream, and its weight where the store has one.
    """

    stream: Tokens
    domains: dict[str, tuple[Tokens, float | None]]


def training_tokens(run: Path, on_progress: OnProgress = unseen) -> TrainingTokens:
    """The run's training tokens.

    on_progress: counts bytes, where all of a store elsewhere are looked at.

    Raises UserError: missing, damaged, or made with another tokenizer.
    """
    sha256 = tokenizer_sha256(load_tokenizer(run / TOKENIZER))
    if (run / ELSEWHERE).exists():
        store = _store_elsewhere(run)
        verify(store, on_progress)  # every byte
        return stored_tokens(store, tokenizer_sha256=sha256)
    if is_store(run):
        return stored_tokens(run, tokenizer_sha256=sha256)
    return TrainingTokens(open_old_store(run / OLD_STORE, tokenizer_sha256=sha256), {})


def stored_tokens(folder: Path, *, tokenizer_sha256: str) -> TrainingTokens:
    """The training tokens of a store.

    Raises UserError: see `open_streams`.
    """
    header, streams = read_header(folder), open_streams(folder, tokenizer_sha256=tokenizer_sha256)
    domains: dict[str, tuple[Tokens, float | None]] = {
        domain.name: (stream, domain.weight)
        for domain, stream in zip(header.domains, streams, strict=True)
    }
    return TrainingTokens(TokenStream.joined(streams), domains)


def lines_in_both(run: Path) -> Shared | None:
    """The run's held-out lines that its training text has too; None: an older run, which never counted.

    Raises UserError: as `training_tokens`.
    """
    if (run / ELSEWHERE).exists():
        return read_header(_store_elsewhere(run)).lines_in_both
    return read_header(run).lines_in_both if is_store(run) else None


def _store_elsewhere(run: Path) -> Path:
    try:
        found = Elsewhere.model_validate(read_json(run / ELSEWHERE))
    except ValidationError:
        raise UserError(f"{run / ELSEWHERE}: does not say where the run's store is") from None
    store = Path(found.store)
    if not is_store(store):
        raise UserError(f"{store}: the store of {run} is not there; put it back to go on")
    if sha256_of(store / DATA / HEADER) != found.sha256:
        verify(store)  # it may be damaged
        raise UserError(f"{store}: is another store than {run} was started with; put that one back")
    return store


def batches_of(tokens: TrainingTokens, config: RunConfig) -> Batches | MixedBatches:
    """The run's batches of its training tokens: mixed by weight where the domains have weights.

    The configuration's weights count before the store's.

    Raises UserError: a text is too short for one sequence, or a weight is of no domain.
    """
    training, weights = config.training, dict(config.data.weights)
    if not weights:
        weights = {name: weight for name, (_, weight) in tokens.domains.items() if weight is not None}
    check_weights(weights, list(tokens.domains))
    if not weights:
        return Batches(
            tokens.stream,
            sequence_length=training.sequence_length,
            batch_size=training.batch_size,
            seed=training.seed,
        )
    return MixedBatches(
        {name: (stream, weights[name]) for name, (stream, _) in tokens.domains.items()},
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=training.seed,
    )


def prepared_files(run: Path) -> list[str]:
    """The names of the files that a run is made with."""
    return sorted([RUN_CONFIG, ENVIRONMENT, *store_files(run)])


def held_out_domains(run: Path) -> dict[str, Path]:
    """The files of the run's held-out text, by domain: those that it was made with.

    Raises UserError: one of them, or the list of them, is damaged.
    """
    names = sorted(name for name in sealed_files(run) if name.startswith(f"{VALIDATION}/"))
    verify(run, only=names)
    return {Path(name).stem: run / name for name in names}


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint is in.

    Raises UserError: it is in none.
    """
    run = checkpoint.absolute().parent.parent
    if not is_run_folder(run):
        raise UserError(f"{checkpoint}: is in no run folder; name a text with --domain NAME=PATH")
    return run
