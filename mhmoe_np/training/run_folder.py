"""A run folder: what a training run reads and leaves behind, and where.

    config.toml        the resolved configuration, every default spelled out
    environment.json   versions, processor, threads
    tokenizer.json     data/train.bin, data/train.json (the token store)
    validation/        each domain's held-out documents, a JSON line each
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

from mhmoe_np.data.batches import Batches
from mhmoe_np.data.documents import Domain, read_domain
from mhmoe_np.data.store import TokenStore, open_store
from mhmoe_np.data.tokenizer import load_tokenizer, tokenizer_sha256
from mhmoe_np.settings.run import RunConfig, Tables, read_toml
from mhmoe_np.storage.checksums import sealed_files

RUN_CONFIG, ENVIRONMENT, TOKENIZER = "config.toml", "environment.json", "tokenizer.json"
METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
ROUTER, REPORT = "router.jsonl", "report.html"
QUANTIZATION, FAILURE = "quantization.jsonl", "failure"
VALIDATION_LOG = "validation.jsonl"
STORE, VALIDATION = "data/train", "validation"
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


def training_store(run: Path) -> TokenStore:
    """The run's training tokens.

    Raises UserError: missing, damaged, or made with another tokenizer.
    """
    sha256 = tokenizer_sha256(load_tokenizer(run / TOKENIZER))
    return open_store(run / STORE, tokenizer_sha256=sha256)


def batches_of(store: TokenStore, config: RunConfig) -> Batches:
    """The run's batches of its training tokens.

    Raises UserError: the text is too short for one sequence.
    """
    training = config.training
    return Batches(
        store.token_W,
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=training.seed,
    )


def prepared_files(run: Path) -> list[str]:
    """The names of the files that a run is made with."""
    inside = [*(run / STORE).parent.iterdir(), *(run / VALIDATION).iterdir()]
    names = [path.relative_to(run).as_posix() for path in inside]
    return sorted([RUN_CONFIG, ENVIRONMENT, TOKENIZER, *names])


def validation_domains(run: Path) -> list[Domain]:
    """The run's held-out text, by domain: what it was made with, and nothing that came there since."""
    sealed = [run / name for name in sealed_files(run) if name.startswith(f"{VALIDATION}/")]
    return [read_domain(path.stem, path) for path in sorted(sealed)]
