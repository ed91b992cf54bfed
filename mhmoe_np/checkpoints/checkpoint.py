"""Checkpoint directories: a model's configuration, weights and tokenizer, and the training state.

Written to a temporary directory and renamed, so a checkpoint is whole or absent. A packed checkpoint
has `packed.safetensors` (see `packed_file`) in the place of `model.safetensors`.

Source   [spec 1 Checkpoint directory]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike
from pydantic import ValidationError, model_validator
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.packed_file import load_packed_weights, save_packed_weights
from mhmoe_np.data.tokenizer import end_of_text_id, load_tokenizer, save_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import Weights
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig, Natural, StrictModel, first_fault, read_model_config
from mhmoe_np.storage.files import write_directory_atomically, write_json
from mhmoe_np.storage.tensors import read_into, save_tensors

MODEL_CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION = "generation_config.json"
PACKED_WEIGHTS = "packed.safetensors"
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"
CHECKPOINTS = "checkpoints"  # the folder in a run folder that holds them


class TrainerState(StrictModel):
    """Where a run stands; with the weights and the moments it is all that a resumed run needs.

    Batches, weights and schedule are pure functions of (seed, step), so no generator's state is kept.
    Files of version 1 are read too.
    """

    version: Literal[2] = 2
    step: Natural  # updates made
    config_sha256: str  # of the run's configuration, less what may change between sittings

    @model_validator(mode="before")
    @classmethod
    def _without_what_version_1_repeats(cls, values: Any) -> Any:
        """Version 1 also said seed and sequences consumed: both follow from the configuration."""
        if not isinstance(values, dict) or values.get("version") != 1:
            return values
        repeated = ("version", "seed", "sequences")
        return {key: value for key, value in values.items() if key not in repeated}


def save_model(directory: Path, parameters: Parameters, tokenizer: Tokenizer | None) -> None:
    """Write `config.json`, `model.safetensors` and, with a tokenizer, its files into `directory`."""
    _save_companions(directory, parameters.config, tokenizer)
    save_tensors(directory / WEIGHTS, parameters.tensors)


def save_packed_model(
    directory: Path, config: ModelConfig, weights: Weights, tokenizer: Tokenizer | None
) -> None:
    """Write `config.json`, `packed.safetensors` and, with a tokenizer, its files into `directory`."""
    _save_companions(directory, config, tokenizer)
    save_packed_weights(directory / PACKED_WEIGHTS, config, weights)


def _save_companions(directory: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    write_json(directory / MODEL_CONFIG, config.model_dump())
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory / TOKENIZER)
        write_json(directory / GENERATION, {"eos_token_id": end_of_text_id(tokenizer)})


def save_training_checkpoint(
    directory: Path,
    parameters: Parameters,
    tokenizer: Tokenizer,
    moments: Moments,
    state: TrainerState,
) -> None:
    """Write a checkpoint that training goes on from, as `directory`, which must not exist yet.

    parameters, moments: the host's.
    Raises OSError: the disk is full or refuses; then nothing is left behind.
    """

    def fill(temporary: Path) -> None:
        save_model(temporary, parameters, tokenizer)
        save_tensors(temporary / OPTIMIZER, moments.tensors())
        write_json(temporary / STATE, state.model_dump())

    write_directory_atomically(directory, fill)


def load_training_checkpoint(
    directory: Path, config: ModelConfig
) -> tuple[Parameters, Moments, TrainerState]:
    """What `save_training_checkpoint` wrote, for a model of `config`: float32, on the host.

    Raises UserError: a file is missing, damaged, or does not fit the configuration.
    """
    state = _read_state(directory / STATE)
    moments = Moments.zeros(config, np.float32)
    read_into(directory / OPTIMIZER, moments.tensors())
    parameters = Parameters(config, np.float32)
    read_into(directory / WEIGHTS, parameters.tensors)
    return parameters, moments, state


def _read_state(path: Path) -> TrainerState:
    try:
        return TrainerState.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error, TrainerState.model_fields)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; resume from another one") from None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((run / CHECKPOINTS).glob("step-*"))


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the last checkpoint of the run folder it is.

    Raises UserError: it is neither.
    """
    if (path / MODEL_CONFIG).is_file():
        return path
    checkpoints = checkpoints_of(path)
    if checkpoints:
        return checkpoints[-1]
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run folder")
    raise UserError(
        f"{path}: neither a checkpoint ({MODEL_CONFIG} is missing) nor a run folder with one"
    )


def is_packed(checkpoint: Path) -> bool:
    """Whether a checkpoint directory has packed weights.

    Raises UserError: it has float ones too, so that it is not clear which are meant.
    """
    packed = (checkpoint / PACKED_WEIGHTS).exists()
    if packed and (checkpoint / WEIGHTS).exists():
        raise UserError(f"{checkpoint}: has both {WEIGHTS} and {PACKED_WEIGHTS}; remove one of them")
    return packed


def load_model(checkpoint: Path, dtype: DTypeLike, *, ops: Operations) -> Model:
    """The model of a checkpoint directory, packed or not, ready to run.

    Raises UserError: a file is missing, damaged, or does not fit the configuration.
    """
    if is_packed(checkpoint):
        config = read_model_config(checkpoint / MODEL_CONFIG)
        weights = load_packed_weights(checkpoint / PACKED_WEIGHTS, config, dtype)
        return Model.with_weights(config, weights.to_device(ops), ops=ops)
    return Model.of(load_parameters(checkpoint, dtype).to_device(ops), ops=ops)


def load_parameters(checkpoint: Path, dtype: DTypeLike) -> Parameters:
    """The float weights of a checkpoint directory, on the host, every tensor accounted for.

    Raises UserError: a file is missing, damaged, or does not fit the configuration.
    """
    parameters = Parameters(read_model_config(checkpoint / MODEL_CONFIG), dtype)
    read_into(checkpoint / WEIGHTS, parameters.tensors)
    return parameters


def load_checkpoint_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises UserError: there is none (one made by `init` has none) or it is damaged.
    """
    tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint / TOKENIZER}: no such file; put the tokenizer.json of the model's text there"
        )
    return tokenizer


def find_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, if it has one.

    Raises UserError: it is damaged.
    """
    path = checkpoint / TOKENIZER
    return load_tokenizer(path) if path.is_file() else None
