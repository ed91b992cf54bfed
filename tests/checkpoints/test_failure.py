"""What a run puts aside of the step that ended it: written, read, and refused where it is damaged."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mhmoe_np.audit.models import parameters
from mhmoe_np.audit.replay import replay
from mhmoe_np.checkpoints.failure import Failure, FailureRecord, load_failure, save_failure
from mhmoe_np.errors import UserError
from mhmoe_np.model.moments import Moments
from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.storage.checksums import reseal
from tests.conftest import Run
from tests.operations.cases import BACKENDS
from tests.strict_backend import strict_operations

SETTINGS = AdamWSettings(1e-3, 0.9, 0.95, 1e-6, 0.1, 1.0)
RECORD = FailureRecord(
    step=13,
    settings=SETTINGS,
    losses={"loss": math.nan, "nll": 4.5, "aux_loss": math.inf, "z_loss": -math.inf},
    fault="layer 1, linear: y_NO[0, 0] = nan",
)
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
FILES = [
    "failure.json",
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "batch.safetensors",
]


def failure(kind: str = "mh2", **bad: float) -> Failure:
    """A state with one number of these in weights or moments."""
    at = parameters(kind, np.float32)
    moments = Moments.zeros(at.config, np.float32)
    for name, group in (("weight", at), ("first", moments.first), ("second", moments.second)):
        if name in bad:
            group.tensors[DOWN][2, 3] = bad[name]
    ids = np.random.default_rng(3).integers(0, at.config.vocab_size, (4, 9))
    return Failure(at, moments, [ids[:2], ids[2:]], RECORD)


def written(directory: Path, **bad: float) -> Path:
    save_failure(directory, *failure(**bad))
    return directory


@pytest.mark.parametrize(
    "bad", [{}, {"weight": math.nan}, {"first": math.inf, "second": -math.inf}], ids=str
)
def test_what_was_written_is_read_finite_or_not(tmp_path: Path, bad: dict[str, float]) -> None:
    expected, read = failure(**bad), load_failure(written(tmp_path / "failure", **bad))
    for one, other in (
        (read.parameters, expected.parameters),
        (read.moments.first, expected.moments.first),
        (read.moments.second, expected.moments.second),
    ):
        assert one.config == other.config
        assert one.flat_P.tobytes() == other.flat_P.tobytes()
    for ids, expected_ids in zip(read.windows, expected.windows, strict=True):
        np.testing.assert_array_equal(ids, expected_ids)
        assert ids.dtype == np.int64
    assert read.record.model_dump() == RECORD.model_dump()
    assert read.record.settings == SETTINGS
    assert math.isnan(read.record.losses["loss"])
    assert [read.record.losses[name] for name in ("aux_loss", "z_loss")] == [math.inf, -math.inf]


def test_its_json_has_words_for_what_json_lacks(tmp_path: Path) -> None:
    text = (written(tmp_path / "failure") / "failure.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(text, parse_constant=refuse)
    assert values["losses"] == {"loss": "nan", "nll": 4.5, "aux_loss": "inf", "z_loss": "-inf"}
    assert values["settings"] == SETTINGS._asdict()
    assert (values["version"], values["step"], values["fault"]) == (1, 13, RECORD.fault)


def said(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_failure(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_damaged_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    directory = written(tmp_path / "failure")
    for content in (b"\xff", b"", (directory / name).read_bytes()[:-3]):
        (directory / name).write_bytes(content)
        assert name in said(directory)
    (directory / name).unlink()
    assert name in said(directory)
    (directory / name).mkdir()
    assert name in said(directory)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": 2}, "version: "),
        ({"step": 0}, "step: "),
        ({"stepp": 1}, "unknown key 'stepp'; did you mean 'step'?"),
        ({"losses": {"loss": "many"}}, "losses.loss: "),
        ({"settings": {"learning_rate": 1.0}}, "missing key 'settings.beta1'"),
        ({"settings": {**SETTINGS._asdict(), "beta3": 1.0}}, "beta3"),
    ],
)
def test_an_edited_record_is_refused_by_its_key(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    path = written(tmp_path / "failure") / "failure.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    reseal(path.parent, path.name)
    assert words in said(path.parent)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "must hold micro_batch_0"),
        ({"micro_batch_1": np.ones((2, 4), np.int64)}, "must hold micro_batch_0"),
        ({"micro_batch_0": np.ones((2, 4), np.int32)}, "must be an int64 array"),
        ({"micro_batch_0": np.ones(4, np.int64)}, "must be an int64 array"),
        ({"micro_batch_0": np.ones((0, 4), np.int64)}, "must be an int64 array"),
        ({"micro_batch_0": np.ones((2, 1), np.int64)}, "rows of 1 tokens; needs 2 to 33"),
        ({"micro_batch_0": np.ones((1, 34), np.int64)}, "rows of 34 tokens; needs 2 to 33"),
        ({"micro_batch_0": np.full((2, 4), 37)}, "outside 0 .. 36"),
        ({"micro_batch_0": np.full((2, 4), -1)}, "outside 0 .. 36"),
    ],
    ids=str,
)
def test_a_batch_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, batch: dict[str, Any], words: str
) -> None:
    directory = written(tmp_path / "failure")
    save_file(batch, directory / "batch.safetensors")
    reseal(directory, "batch.safetensors")
    assert words in said(directory)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_batch_of_numbers_that_numpy_lacks_is_refused(tmp_path: Path, dtype: str) -> None:
    size = 8 * (2 if dtype == "BF16" else 1)
    described = {"micro_batch_0": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}
    header = json.dumps(described).encode()
    path = written(tmp_path / "failure") / "batch.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    reseal(path.parent, path.name)
    assert "batch.safetensors: not a readable safetensors file" in said(path.parent)


def test_another_directory_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in said(tmp_path / "nothing")
    assert "has no failure.json" in said(tmp_path)


# ---- repeated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "strict"])
def test_the_state_is_looked_through_and_the_step_repeated(backend: str) -> None:
    ops = strict_operations()[0] if backend == "strict" else BACKENDS[backend]
    healthy = replay(failure(), ops=ops)
    assert healthy.state == []
    assert healthy.step.fault is None
    assert healthy.step.result is not None
    assert healthy.step.result.is_finite

    poor = replay(failure(weight=math.nan, second=math.inf), ops=ops)
    assert [str(tensor) for tensor in poor.state] == [
        f"weight {DOWN}[2, 3] = nan (1 of 168 values not finite)",
        f"second moment of {DOWN}[2, 3] = inf (1 of 168 values not finite)",
    ]
    assert poor.step.fault is not None
    assert (poor.step.fault.tensor, poor.step.fault.layer) == (DOWN, 1)

    quantised = replay(failure("mh2-ternary", weight=math.nan), ops=ops)
    assert quantised.step.fault is not None
    assert quantised.step.fault.tensor == DOWN


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_command_says_what_was_recorded_and_what_it_found(
    mhmoe: Run, tmp_path: Path, backend: str
) -> None:
    written(tmp_path / "bad", weight=math.nan)
    lines = mhmoe("replay", "bad", "--backend", backend, "--threads", 1).stdout.splitlines()
    assert lines[0] == "step 13, micro-batches [2, 9], [2, 9]"
    assert lines[1].startswith("settings: learning_rate 0.001, beta1 0.9, ")
    assert lines[2] == f"recorded: loss nan, nll 4.5, aux_loss inf, z_loss -inf; {RECORD.fault}"
    assert lines[3] == f"state: weight {DOWN}[2, 3] = nan (1 of 168 values not finite)"
    assert lines[4].startswith("largest hidden state, embedding: ")
    assert lines[-1] == (
        "first not finite: micro-batch 0, layer 1, expert_ffn of model.layers.1.mlp.experts: "
        f"its weight {DOWN}[2, 3] = nan (1 of 168 values not finite)"
    )
    values = json.loads(mhmoe("replay", "bad", "--backend", backend, "--json").stdout)
    assert values["recorded"]["losses"]["loss"] == "nan"
    assert values["found"]["fault"]["tensor"] == DOWN
    assert values["found"]["fault"]["place"] == [2, 3]
    assert lines[-1].endswith(values["found"]["fault"]["sentence"])
    assert values["found"]["state"][0]["value"] == "nan"


def test_the_command_says_that_a_step_is_finite_when_repeated(mhmoe: Run, tmp_path: Path) -> None:
    written(tmp_path / "good")
    lines = mhmoe("replay", "good", "--backend", "numpy").stdout.splitlines()
    assert lines[3] == "state: weights and moments are finite"
    assert lines[-1].startswith("the step is finite when repeated: loss ")
    values = json.loads(mhmoe("replay", "good", "--backend", "numpy", "--json").stdout)
    assert values["found"]["fault"] is None
    assert values["found"]["losses"]["loss"] > 0


def test_bad_input_ends_the_command_with_one_line(mhmoe: Run, tmp_path: Path) -> None:
    assert "no such directory" in mhmoe("replay", "nothing", code=2).stderr
    (written(tmp_path / "torn") / "batch.safetensors").write_bytes(b"")
    found = mhmoe("replay", "torn", code=2)
    assert "batch.safetensors" in found.stderr
    assert found.stderr.count("\n") == 1
