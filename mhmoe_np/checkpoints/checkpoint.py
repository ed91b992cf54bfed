"""Checkpoint directories: a model's configuration, weights and tokenizer, and the training state.

Written to a temporary directory and renamed, so a checkpoint is whole or absent; what happens to its
files afterwards its `checksums.json` tells, which every reading looks at. Numbers that are not finite
are refused. A packed checkpoint has `packed.safetensors` (see `packed_file`) in the place of
`model.safetensors`.

Source   [spec 1 Checkpoint directory]
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.mapped_weights import load_mapped_weights
from mhmoe_np.checkpoints.packed_file import load_packed_weights, write_packed_weights
from mhmoe_np.data.tokenizer import end_of_text_id, load_tokenizer, save_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.room import check_room
from mhmoe_np.model.weights import Weights
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import LARGEST_SIZE, ModelConfig, read_model_config, shown
from mhmoe_np.storage.checksums import seal, verify
from mhmoe_np.storage.files import write_json
from mhmoe_np.storage.reading import read_json
from mhmoe_np.storage.tensors import check_finite, read_into, write_tensors

MODEL_CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION = "generation_config.json"
PACKED_WEIGHTS = "packed.safetensors"
OPTIMIZER = "optimizer.safetensors"  # of a training checkpoint
CHECKPOINTS = "checkpoints"  # the folder in a run folder that holds them
BEST = "best"  # what RUN/checkpoints/best stands for: the model of the best validation


def save_model(
    directory: Path,
    parameters: Parameters,
    tokenizer: Tokenizer | None,
    end_of_text: tuple[int, ...] = (),
) -> None:
    """Write `config.json`, `model.safetensors` and, with a tokenizer, its files into `directory`.

    end_of_text: the ids that end a text; none: the tokenizer's own.

    Raises OSError: the disk is full or refuses.
    """
    seal(directory, write_model_files(directory, parameters, tokenizer, end_of_text))


def write_model_files(
    directory: Path,
    parameters: Parameters,
    tokenizer: Tokenizer | None,
    end_of_text: tuple[int, ...] = (),
) -> list[str]:
    """`save_model` without the checksums; the names of the files."""
    names = _write_companions(directory, parameters.config, tokenizer, end_of_text)
    write_tensors(directory / WEIGHTS, parameters.tensors)
    return [*names, WEIGHTS]


def save_packed_model(
    directory: Path,
    config: ModelConfig,
    weights: Weights,
    tokenizer: Tokenizer | None,
    end_of_text: tuple[int, ...] = (),
) -> None:
    """Write `config.json`, `packed.safetensors` and, with a tokenizer, its files into `directory`.

    end_of_text: as `save_model`.

    Raises OSError: the disk is full or refuses.
    """
    names = _write_companions(directory, config, tokenizer, end_of_text)
    write_packed_weights(directory / PACKED_WEIGHTS, config, weights)
    seal(directory, [*names, PACKED_WEIGHTS])


def _write_companions(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer | None, end_of_text: tuple[int, ...]
) -> list[str]:
    write_json(directory / MODEL_CONFIG, config.model_dump())
    return [MODEL_CONFIG, *write_tokenizer(directory, tokenizer, end_of_text)]


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer | None, end_of_text: tuple[int, ...]
) -> list[str]:
    """Write `tokenizer.json`, if there is one, and the ids that end a text; the names of the files.

    end_of_text: none: the tokenizer's own.

    Raises UserError: nothing says what ends a text; OSError: the disk is full or refuses.
    """
    names = []
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory / TOKENIZER)
        names.append(TOKENIZER)
        end_of_text = end_of_text or (end_of_text_id(tokenizer),)
    if end_of_text:
        ids = list(end_of_text)
        write_json(directory / GENERATION, {"eos_token_id": ids if len(ids) > 1 else ids[0]})
        names.append(GENERATION)
    return names


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return _numbered(run, "step")


def best_models_of(run: Path) -> list[Path]:
    """The models of a run folder that were the best of their time by validation, the best one last."""
    return _numbered(run, BEST)


def _numbered(run: Path, kind: str) -> list[Path]:
    found = [path for path in (run / CHECKPOINTS).glob(f"{kind}-*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name[5:])


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the last checkpoint of the run folder it is.

    RUN/checkpoints/best is the model that scored best while RUN was trained with `eval_every`.

    Raises UserError: it is neither.
    """
    if (path / MODEL_CONFIG).is_file():
        return path
    if path.name == BEST and path.parent.name == CHECKPOINTS:
        best = best_models_of(path.parent.parent)
        if not best:
            raise UserError(f"{path}: no such model; it is kept by `train --eval-every N`")
        return best[-1]
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


class StoredModel(NamedTuple):
    """A model as its checkpoint has it, on the host; no backend is needed to read it."""

    weights: Weights | Parameters  # parameters: of a model that is quantised by its backend

    def ready(self, *, ops: Operations) -> Model:
        """The model, in the backend's arrays, ready to run."""
        if isinstance(self.weights, Parameters):
            return Model.of(self.weights.to_device(ops), ops=ops)
        return Model.with_weights(self.weights.config, self.weights.to_device(ops), ops=ops)


def read_model(checkpoint: Path, dtype: DTypeLike, on_progress: OnProgress = unseen) -> StoredModel:
    """The model of a checkpoint directory, packed or not.

    on_progress: counts the bytes of each file.

    Raises UserError: a file is missing, damaged, not finite, or does not fit the configuration.
    """
    verify(checkpoint, on_progress)
    packed, config = is_packed(checkpoint), read_model_config(checkpoint / MODEL_CONFIG)
    if config.is_quantised and not packed:
        return StoredModel(load_weights(checkpoint, config, dtype, on_progress))
    check_room(config, copies=0 if packed else 1, source=str(checkpoint / MODEL_CONFIG))
    if packed:
        weights = load_packed_weights(checkpoint / PACKED_WEIGHTS, config, dtype, on_progress)
    else:
        weights = load_mapped_weights(checkpoint / WEIGHTS, config, dtype, on_progress)
    return StoredModel(weights)


def load_model(
    checkpoint: Path, dtype: DTypeLike, *, ops: Operations, on_progress: OnProgress = unseen
) -> Model:
    """The model of a checkpoint directory, packed or not, ready to run.

    on_progress and what it raises: see `read_model`.
    """
    return read_model(checkpoint, dtype, on_progress).ready(ops=ops)


def load_parameters(checkpoint: Path, dtype: DTypeLike, on_progress: OnProgress = unseen) -> Parameters:
    """The float weights of a checkpoint directory, on the host, every tensor accounted for.

    on_progress: counts the bytes of each file.

    Raises UserError: a file is missing, damaged, not finite, or does not fit the configuration.
    """
    verify(checkpoint, on_progress)
    return load_weights(checkpoint, read_model_config(checkpoint / MODEL_CONFIG), dtype, on_progress)


def load_weights(
    checkpoint: Path, config: ModelConfig, dtype: DTypeLike, on_progress: OnProgress = unseen
) -> Parameters:
    """The float weights of a checkpoint directory for a model of `config`, which may not be its own.

    on_progress: counts bytes.

    Raises UserError: see `load_parameters`.
    """
    check_room(config, copies=1, source=str(checkpoint / MODEL_CONFIG))
    parameters = Parameters(config, dtype)
    read_into(checkpoint / WEIGHTS, parameters.tensors, on_progress)
    check_finite(checkpoint / WEIGHTS, parameters.tensors)
    return parameters


def load_checkpoint_tokenizer(checkpoint: Path, on_progress: OnProgress = unseen) -> Tokenizer:
    """The tokenizer of a checkpoint directory; the model's other files are not looked at.

    on_progress: counts the bytes of its files.

    Raises UserError: there is none (one made by `init` has none) or it is damaged.
    """
    verify(checkpoint, on_progress, only=(TOKENIZER, GENERATION))
    tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint / TOKENIZER}: no such file; put the tokenizer.json of the model's text there"
        )
    return tokenizer


def load_end_of_text(checkpoint: Path) -> tuple[int, ...]:
    """The ids that end a text of a checkpoint directory; none: it does not say.

    Raises UserError: it says something else there.
    """
    return read_end_of_text(checkpoint / GENERATION)


def read_end_of_text(path: Path) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a JSON file; none where it has no such key, or there is no file.

    Raises UserError: it cannot be read, or holds neither an id nor a list of them.
    """
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    found = values.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(type(token) is int and 0 <= token <= LARGEST_SIZE for token in ids):
        raise UserError(f"{path}: eos_token_id is {shown(found)}; must be an id or a list of ids")
    return tuple(ids)


def find_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, if it has one.

    Raises UserError: it is damaged.
    """
    path = checkpoint / TOKENIZER
    return load_tokenizer(path) if path.is_file() else None
