"""What a run puts aside of the step that ended it: state, batch, and what the step came to.

A directory with the files of a checkpoint, less the tokenizer; its weights and moments may hold numbers
that are not finite, which is why nobody goes on from it. `mhmoe-np replay` repeats the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from mhmoe_np.checkpoints.checkpoint import (
    MODEL_CONFIG,
    OPTIMIZER,
    WEIGHTS,
    write_model_files,
)
from mhmoe_np.errors import UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig, Positive, StrictModel, first_fault, read_model_config
from mhmoe_np.storage.checksums import seal, verify
from mhmoe_np.storage.files import write_directory_atomically, write_json
from mhmoe_np.storage.reading import read_json
from mhmoe_np.storage.tensors import read_into, read_tensors, write_tensors
from mhmoe_np.types import IntArray

BATCH, FAILURE = "batch.safetensors", "failure.json"
WITHOUT_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _number(value: Any) -> Any:
    return WITHOUT_JSON.get(value, value) if isinstance(value, str) else value


# JSON has no NaN and no infinity: they are written as words.
AnyFloat = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(_number),
    PlainSerializer(lambda value: value if math.isfinite(value) else str(value)),
]


class FailureRecord(StrictModel):
    """The step that failed: `failure.json`."""

    version: Literal[1] = 1
    step: Positive  # counted from 1
    settings: Annotated[AdamWSettings, PlainSerializer(lambda settings: settings._asdict())]
    losses: Mapping[str, AnyFloat]
    fault: str | None  # what the run itself found to be the first number that is not finite


class Failure(NamedTuple):
    """All that the step depends on, on the host, and what it came to."""

    # Before the step; where parameters were left out of its update, all others after it.
    parameters: Parameters
    moments: Moments
    windows: list[IntArray]  # of each micro-batch: [B, T+1]
    record: FailureRecord


def save_failure(
    directory: Path,
    parameters: Parameters,
    moments: Moments,
    windows: Sequence[IntArray],
    record: FailureRecord,
) -> None:
    """Write what `load_failure` reads, as `directory`, which must not exist yet.

    parameters, moments: the host's, before the step; windows: each micro-batch's, [B, T+1].
    Raises OSError: the disk is full or refuses; then nothing is left behind.
    """

    def fill(temporary: Path) -> None:
        names = write_model_files(temporary, parameters, None)
        write_tensors(temporary / OPTIMIZER, moments.tensors())
        batch = {f"micro_batch_{i}": part.astype(np.int64) for i, part in enumerate(windows)}
        write_tensors(temporary / BATCH, batch)
        write_json(temporary / FAILURE, record.model_dump())
        seal(temporary, [*names, OPTIMIZER, BATCH, FAILURE])

    write_directory_atomically(directory, fill)


def load_failure(directory: Path, on_progress: OnProgress = unseen) -> Failure:
    """What `save_failure` wrote; weights and moments as they are, finite or not, in float32.

    on_progress: counts the bytes of each file.

    Raises UserError: it is no such directory; a file is missing, damaged, or does not fit the others.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not (directory / FAILURE).exists():
        raise UserError(f"{directory}: has no {FAILURE}; give a directory that a failed run put aside")
    verify(directory, on_progress)
    record = _read_record(directory / FAILURE)
    config = read_model_config(directory / MODEL_CONFIG)
    windows = _read_windows(directory / BATCH, config)
    parameters, moments = Parameters(config, np.float32), Moments.zeros(config, np.float32)
    read_into(directory / WEIGHTS, parameters.tensors, on_progress)
    read_into(directory / OPTIMIZER, moments.tensors(), on_progress)
    return Failure(parameters, moments, windows, record)


def _read_record(path: Path) -> FailureRecord:
    values = read_json(path)
    try:
        return FailureRecord.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error, FailureRecord.model_fields)}") from None


def _read_windows(path: Path, config: ModelConfig) -> list[IntArray]:
    tensors = read_tensors(path)
    names = [f"micro_batch_{i}" for i in range(len(tensors))]
    if not names or set(names) != set(tensors):
        raise UserError(f"{path}: must hold micro_batch_0, micro_batch_1 and so on, nothing else")
    most = config.max_position_embeddings + 1
    for name in names:
        found = tensors[name]
        if found.dtype != np.int64 or found.ndim != 2 or not found.size:
            raise UserError(f"{path}: {name} must be an int64 array [B, T+1]")
        if not 2 <= found.shape[1] <= most:
            raise UserError(f"{path}: {name} has rows of {found.shape[1]} tokens; needs 2 to {most}")
        if found.min() < 0 or found.max() >= config.vocab_size:
            raise UserError(f"{path}: {name} has ids outside 0 .. {config.vocab_size - 1}")
    return [tensors[name] for name in names]
