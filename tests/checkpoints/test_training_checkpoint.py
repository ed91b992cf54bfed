"""A training checkpoint gives back all that went in; older ones are read, foreign ones refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mhmoe_np.audit.models import settings
from mhmoe_np.checkpoints.training_state import (
    Change,
    LogMark,
    TrainerState,
    TrainingCheckpoint,
    load_training_checkpoint,
    save_training_checkpoint,
)
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.settings.run import RunConfig, merge, parse_run_config
from mhmoe_np.storage.checksums import CHECKSUMS, reseal

TABLES = {
    "model": settings("mh2-shared"),
    "training": {"steps": 9, "batch_size": 4, "sequence_length": 8, "seed": 5},
}
CONFIG = parse_run_config(TABLES, source="test")
STATE = TrainerState(
    step=7,
    config=CONFIG,
    changes=[Change(step=3, key="optimizer.learning_rate", before=1e-3, now=1e-4)],
    logs={"metrics.jsonl": LogMark(bytes=12, xxh3_128="0" * 32)},
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text to learn from"], vocab_size=270)


@pytest.fixture
def checkpoint() -> TrainingCheckpoint:
    parameters, moments = Parameters(CONFIG.model, np.float32), Moments.zeros(CONFIG.model, np.float32)
    for seed, group in enumerate((parameters, *moments)):
        initialise(group, seed)
    return TrainingCheckpoint(parameters, moments, STATE)


@pytest.fixture
def directory(checkpoint: TrainingCheckpoint, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    directory = tmp_path / "step-00000007"
    save_training_checkpoint(directory, checkpoint, tokenizer)
    return directory


def load(directory: Path, config: RunConfig = CONFIG) -> TrainingCheckpoint:
    return load_training_checkpoint(directory, config)


def test_what_was_written_is_read(directory: Path, checkpoint: TrainingCheckpoint) -> None:
    parameters, moments, state = load(directory)
    assert state == STATE
    for one, other in zip(
        (parameters, *moments), (checkpoint.parameters, *checkpoint.moments), strict=True
    ):
        assert one.flat_P.tobytes() == other.flat_P.tobytes()


def edit_state(directory: Path, values: dict[str, object], *, without: str = "") -> None:
    path = directory / "trainer_state.json"
    edited = json.loads(path.read_text()) | values
    edited.pop(without, None)
    path.write_text(json.dumps(edited))
    reseal(directory, path.name)


def older(directory: Path, values: dict[str, object]) -> Path:
    """As the releases before wrote it."""
    state = {"step": 7, "config_sha256": CONFIG.identity(), **values}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    (directory / CHECKSUMS).unlink()
    return directory


@pytest.mark.parametrize("values", [{"version": 2}, {"version": 1, "seed": 5, "sequences": 28}])
def test_states_of_older_releases_are_read(directory: Path, values: dict[str, object]) -> None:
    assert load(older(directory, values)).state == TrainerState(step=7, config=CONFIG)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": 1, "seed": 6, "sequences": 28}, "another run"),
        ({"version": 1, "seed": 5, "sequences": 24}, "another run"),
        ({"version": 2, "config_sha256": "0" * 64}, "another run"),
        ({"version": 1, "colour": "red"}, "unknown key 'colour'"),
        ({"version": 2, "step": 6}, "says step 6"),
    ],
)
def test_an_older_state_that_does_not_fit_is_refused(
    directory: Path, values: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load(older(directory, values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": 4}, "version: "),
        ({"step": -1}, "step: "),
        ({"step": 8}, "says step 8"),
        ({"seed": 0}, "unknown key 'seed'"),
        ({"config": {}}, "missing key 'config.model'"),
    ],
)
def test_an_edited_state_is_refused_by_its_key(
    directory: Path, values: dict[str, object], words: str
) -> None:
    edit_state(directory, values)
    with pytest.raises(Damaged, match=rf"trainer_state\.json: {words}"):
        load(directory)


def test_a_checkpoint_of_another_run_is_refused(directory: Path) -> None:
    lower = parse_run_config(merge(TABLES, {"optimizer": {"learning_rate": 1e-5}}), source="test")
    assert load(directory, lower).state == STATE
    other = parse_run_config(merge(TABLES, {"training": {"seed": 6}}), source="test")
    with pytest.raises(UserError, match="another run"):
        load(directory, other)


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "optimizer.safetensors", "model.safetensors", "config.json", CHECKSUMS],
)
def test_a_missing_or_damaged_file_is_named(directory: Path, name: str) -> None:
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (b"\xff", b"", bytes(content)):
        (directory / name).write_bytes(damaged)
        with pytest.raises(Damaged, match=name):
            load(directory)
    (directory / name).unlink()
    with pytest.raises(Damaged, match=f"{name}: "):
        load(directory)


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(
    checkpoint: TrainingCheckpoint, tokenizer: Tokenizer, tmp_path: Path, group: int, bad: float
) -> None:
    spoilt = (checkpoint.parameters, *checkpoint.moments)[group]
    spoilt.tensors["model.norm.weight"][3] = bad
    directory = tmp_path / "step-00000007"
    save_training_checkpoint(directory, checkpoint, tokenizer)
    with pytest.raises(Damaged, match=r"model\.norm\.weight' holds numbers that are not finite"):
        load(directory)
