"""A training checkpoint gives back all that went in; older ones are read, foreign ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mhmoe_np.audit.models import settings
from mhmoe_np.checkpoints.checkpoint import (
    TrainerState,
    load_training_checkpoint,
    save_training_checkpoint,
)
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.settings.model import ModelConfig

CONFIG = ModelConfig.model_validate(settings("mh2-shared"))
STATE = TrainerState(step=7, config_sha256="0" * 64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text to learn from"], vocab_size=270)


@pytest.fixture
def written(tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, Parameters, Moments]:
    parameters, moments = Parameters(CONFIG, np.float32), Moments.zeros(CONFIG, np.float32)
    for seed, group in enumerate((parameters, *moments)):
        initialise(group, seed)
    directory = tmp_path / "step-00000007"
    save_training_checkpoint(directory, parameters, tokenizer, moments, STATE)
    return directory, parameters, moments


def test_what_was_written_is_read(written: tuple[Path, Parameters, Moments]) -> None:
    directory, parameters, moments = written
    read, read_moments, state = load_training_checkpoint(directory, CONFIG)
    assert state == STATE
    for one, other in zip((parameters, *moments), (read, *read_moments), strict=True):
        assert one.flat_P.tobytes() == other.flat_P.tobytes()


def edit_state(directory: Path, **values: object) -> None:
    path = directory / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_state_of_version_1_is_read(written: tuple[Path, Parameters, Moments]) -> None:
    directory, *_ = written
    edit_state(directory, version=1, seed=0, sequences=28)
    assert load_training_checkpoint(directory, CONFIG)[2] == STATE


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": 3}, "version: "),
        ({"step": -1}, "step: "),
        ({"seed": 0}, "unknown key 'seed'"),
        ({"version": 1, "colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_an_edited_state_is_refused_by_its_key(
    written: tuple[Path, Parameters, Moments], values: dict[str, object], words: str
) -> None:
    directory, *_ = written
    edit_state(directory, **values)
    with pytest.raises(UserError, match=rf"trainer_state\.json: {words}"):
        load_training_checkpoint(directory, CONFIG)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(
    written: tuple[Path, Parameters, Moments], name: str
) -> None:
    directory, *_ = written
    (directory / name).write_bytes(b"\xff")
    with pytest.raises(UserError, match=rf"{name}: "):
        load_training_checkpoint(directory, CONFIG)
    (directory / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: "):
        load_training_checkpoint(directory, CONFIG)
