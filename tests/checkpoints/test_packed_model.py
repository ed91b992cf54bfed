"""A packed model is the fake-quantised one, bit for bit, in memory, on disk and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mhmoe_np.audit.models import DEFAULT_SEED, QUANTISED, settings
from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints import packed_file
from mhmoe_np.checkpoints.checkpoint import load_model, save_model, save_packed_model
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.packed import pack_weights, unpack_weights
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu import NumbaOperations
from mhmoe_np.operations.numba_cpu.instruction_set import VARIABLE, available
from mhmoe_np.operations.packing import FormatName, unpack
from mhmoe_np.operations.table import Operations, PackedWeight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.checksums import reseal
from tests.conftest import Run

TOKENS = np.random.default_rng(9).integers(0, 37, (5, 33))
# Shared between tests, so that each set of kernels is made once.
BACKENDS: dict[str, Operations] = {"numpy": load_operations("numpy")} | {
    name: NumbaOperations(instruction_set=name) for name in available()
}


def _config(kind: str) -> ModelConfig:
    return ModelConfig.model_validate(settings(kind))


def _parameters(config: ModelConfig) -> Parameters:
    parameters = Parameters(config, np.float32)
    initialise(parameters, seed=DEFAULT_SEED)
    return parameters


def _same_traces(one: Model, other: Model, ops: Operations) -> None:
    first = trace(one, TOKENS, gradients=False, ops=ops)
    second = trace(other, TOKENS, gradients=False, ops=ops)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tobytes() == second[name].tobytes(), name


def _cases() -> list[tuple[str, FormatName]]:
    return [(kind, format) for kind in QUANTISED for format in formats_for(_config(kind))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "format"), _cases())
def test_packed_traces_are_the_fake_quantised_ones(kind: str, format: FormatName, backend: str) -> None:
    # [spec 5 packed weights]
    ops, config = BACKENDS[backend], _config(kind)
    parameters = _parameters(config)
    packed = pack_weights(parameters, format, ops=ops)
    assert any(isinstance(weight, PackedWeight) for weight in packed.arrays.values())
    _same_traces(Model.of(parameters, ops=ops), Model.with_weights(config, packed, ops=ops), ops)


def _constant(value: float) -> Any:
    return lambda tensor: np.full_like(tensor, value)


EXTREMES: dict[str, Any] = {
    "every weight +1": _constant(0.25),
    "every weight -1": _constant(-0.25),
    "zero matrices": _constant(0.0),
    "below the smallest scale": lambda tensor: tensor * np.float32(1e-7),
    "one large weight a matrix": lambda tensor: np.where(
        np.arange(tensor.size).reshape(tensor.shape) == tensor.size // 2, np.float32(1e4), tensor
    ),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("kind", ["mh3-sign-projections-bias", "mh2-ternary-shared-capacity"])
def test_extreme_weights_survive_packing_and_unpacking(kind: str, extreme: str) -> None:
    config = _config(kind)
    parameters = _parameters(config)
    for entry in parameters.table:
        if entry.quantised:
            for part in entry.parts:
                tensor = parameters.tensors[part.tensor]
                tensor[...] = EXTREMES[extreme](tensor)
    default = load_operations("numba")
    for format in formats_for(config):
        packed = pack_weights(parameters, format, ops=default)
        floats = unpack_weights(config, packed, ops=default)
        for ops in BACKENDS.values():
            model = Model.of(parameters, ops=ops)
            _same_traces(model, Model.with_weights(config, packed, ops=ops), ops)
        _same_traces(Model.of(parameters, ops=default), Model.of(floats, ops=default), default)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e9])
def test_rows_of_zeros_and_of_extreme_size_agree(scale: float) -> None:
    config = _config("mh2-ternary-no-sub-norm")
    parameters = _parameters(config)
    parameters.tensors["model.layers.0.input_layernorm.weight"][...] = scale
    parameters.tensors["model.layers.1.post_attention_layernorm.weight"][...] = scale
    for ops in BACKENDS.values():
        packed = pack_weights(parameters, "ternary-2bit", ops=ops)
        _same_traces(Model.of(parameters, ops=ops), Model.with_weights(config, packed, ops=ops), ops)


@pytest.mark.parametrize("kind", ["dense-ternary", "mh2-sign-shared", "mh3-sign"])
def test_cached_decoding_is_the_same_packed(kind: str) -> None:
    config, ops = _config(kind), load_operations("numba")
    parameters = _parameters(config)
    logits = []
    for weights in (None, pack_weights(parameters, formats_for(config)[0], ops=ops)):
        model = Model.of(parameters, ops=ops)
        if weights is not None:
            model = Model.with_weights(config, weights, ops=ops)
        cache = KeyValueCache(model, sequences=1, positions=9, ops=ops)
        steps = [cache.extend(TOKENS[:1, t : t + 1]) for t in range(9)]
        logits.append(np.stack(steps).tobytes())
    assert logits[0] == logits[1]


@pytest.mark.parametrize("kind", QUANTISED)
def test_unpacking_gives_the_same_model_and_packing_it_again_the_same_file(
    kind: str, tmp_path: Path
) -> None:
    # [D11]
    config, ops = _config(kind), load_operations("numba")
    parameters = _parameters(config)
    for format in formats_for(config):
        packed = pack_weights(parameters, format, ops=ops)
        floats = unpack_weights(config, packed, ops=ops)
        _same_traces(Model.of(parameters, ops=ops), Model.of(floats, ops=ops), ops)
        for name, weights in (("a", packed), ("b", pack_weights(floats, format, ops=ops))):
            (tmp_path / name).mkdir(exist_ok=True)
            save_packed_model(tmp_path / name, config, weights, None)
        a, b = ((tmp_path / name / "packed.safetensors").read_bytes() for name in "ab")
        assert a == b


@pytest.mark.parametrize("kind", ["mh2-ternary-projections", "mh2-sign-shared"])
def test_what_is_loaded_is_what_was_packed_and_stays_packed(kind: str, tmp_path: Path) -> None:
    config, ops = _config(kind), load_operations("numba")
    parameters = _parameters(config)
    packed = pack_weights(parameters, formats_for(config)[0], ops=ops)
    save_packed_model(tmp_path, config, packed, None)
    model = load_model(tmp_path, np.float32, ops=ops)
    _same_traces(Model.with_weights(config, packed, ops=ops), model, ops)
    for entry in parameters.table:
        weight = model.weights.arrays[entry.name]
        assert isinstance(weight, PackedWeight) == entry.quantised
        if isinstance(weight, PackedWeight):
            values = np.unique(unpack(weight.w))
            assert set(values) <= ({-1, 0, 1} if "ternary" in kind else {-1, 1})
    stored = load_file(tmp_path / "packed.safetensors")
    floats = [name for name, tensor in stored.items() if tensor.dtype == np.float32]
    quantised = {part.tensor for entry in parameters.table if entry.quantised for part in entry.parts}
    assert not quantised & set(floats)


def test_float64_traces_of_a_packed_model_are_those_of_float32_to_its_rounding(
    tmp_path: Path,
) -> None:
    config, ops = _config("mh2-ternary-shared-capacity"), load_operations("numba")
    save_packed_model(
        tmp_path, config, pack_weights(_parameters(config), "ternary-2bit", ops=ops), None
    )
    narrow, wide = (
        trace(load_model(tmp_path, dtype, ops=ops), TOKENS[:1, :5], gradients=False, ops=ops)["logits"]
        for dtype in (np.float32, np.float64)
    )
    assert wide.dtype == np.float64
    # Also an activation may round to the other neighbour: one step of 1/127 of its row's largest.
    assert np.abs(wide - narrow).max() <= 1e-2 * np.abs(wide).max()


# ---- the commands ----------------------------------------------------------------------------


@pytest.fixture
def model(mhmoe_here: Run, tmp_path: Path) -> Path:
    """A checkpoint `model`, its packed form `packed`, and `tokens.npy`."""
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2-ternary-shared-capacity")))
    np.save(tmp_path / "tokens.npy", TOKENS)
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 4)
    printed = mhmoe_here("pack", "model", "--out", "packed").stdout
    assert "ternary-2bit" in printed
    assert "bits/weight" in printed
    return tmp_path


def _logits(mhmoe: Run, folder: Path, checkpoint: str, *options: str) -> bytes:
    out = f"{checkpoint}-trace.safetensors"
    mhmoe("trace", checkpoint, "--tokens", "tokens.npy", "--out", out, "--no-grad", *options)
    logits = load_file(folder / out)["logits"].tobytes()
    (folder / out).unlink()  # trace replaces nothing
    return logits


def test_pack_trace_unpack_inspect(mhmoe: Run, model: Path) -> None:
    expected = _logits(mhmoe, model, "model")
    assert _logits(mhmoe, model, "packed") == expected
    mhmoe("pack", "model", "--out", "small", "--format", "ternary-base3")
    assert _logits(mhmoe, model, "small") == expected
    mhmoe("unpack", "small", "--out", "floats")
    assert _logits(mhmoe, model, "floats") == expected
    assert _logits(mhmoe, model, "packed", "--backend", "numpy") == _logits(
        mhmoe, model, "model", "--backend", "numpy"
    )

    rows = {
        name: {row["name"]: row for row in json.loads(mhmoe("inspect", name, "--json").stdout)}
        for name in ("model", "packed", "small")
    }
    down = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert list(rows["packed"]) == list(rows["model"])
    for name, row in rows["packed"].items():
        float_row = rows["model"][name]
        assert {key: row[key] for key in ("scale", "minus", "zero", "plus")} == {
            key: float_row[key] for key in ("scale", "minus", "zero", "plus")
        }
        if row["scale"] is not None:
            assert row["minus"] + row["zero"] + row["plus"] == pytest.approx(1)
            assert row["bytes"] < float_row["bytes"]
    assert rows["packed"][down]["format"] == "ternary-2bit"
    assert rows["small"][down]["format"] == "ternary-base3"
    assert rows["model"][down]["format"] == "float32"
    assert "model.norm.weight" in mhmoe("inspect", "packed").stdout


@pytest.mark.parametrize("instruction_set", available())
def test_the_environment_forces_an_instruction_set(
    mhmoe: Run, model: Path, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _logits(mhmoe, model, "model")
    monkeypatch.setenv(VARIABLE, instruction_set)
    assert _logits(mhmoe, model, "packed") == expected


def test_a_processor_without_wide_vectors_gives_its_own_fake_quantised_bits(model: Path) -> None:
    """Everything compiled for a lesser processor, as Numba's own variables say it."""
    code = (
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from mhmoe_np.checkpoints.checkpoint import load_model\n"
        "from mhmoe_np.operations.load import load_operations\n"
        "from mhmoe_np.operations.numba_cpu.instruction_set import choose\n"
        "from mhmoe_np.audit.trace import trace\n"
        "ops = load_operations('numba')\n"
        "tokens = np.load('tokens.npy')\n"
        "logits = [trace(load_model(Path(name), np.float32, ops=ops), tokens, gradients=False, ops=ops)"
        "['logits'].tobytes() for name in ('model', 'packed')]\n"
        "print(choose(), logits[0] == logits[1])\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=model, env=environment, capture_output=True, text=True
    )
    assert result.stdout == "portable True\n", result.stderr


def test_an_unknown_instruction_set_is_one_line(
    mhmoe_here: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sse9")
    result = mhmoe_here("inspect", "packed", code=2)
    assert result.stderr.count("\n") == 1
    assert f"{VARIABLE}=sse9" in result.stderr
    assert "portable" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "model", "--out", "packed"], ["packed", "exists"]),
        (["pack", "packed", "--out", "new"], ["packed already"]),
        (["pack", "model", "--out", "new", "--format", "sign-1bit"], ["sign-1bit", "ternary-2bit"]),
        (["pack", "missing", "--out", "new"], ["missing"]),
        (["unpack", "model", "--out", "new"], ["not packed"]),
        (["unpack", "packed", "--out", "model"], ["model", "exists"]),
        (["inspect", "missing"], ["missing"]),
        (
            ["trace", "packed", "--tokens", "tokens.npy", "--out", "new"],
            ["no gradients", "--no-grad"],
        ),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    mhmoe_here: Run, model: Path, arguments: list[str], words: list[str]
) -> None:
    before = sorted(path.name for path in model.iterdir())
    result = mhmoe_here(*arguments, code=2)
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_float_model_is_not_packed_to_a_bitnets_format(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2")))
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 4)
    result = mhmoe_here("pack", "model", "--format", "ternary-2bit", "--out", "packed", code=2)
    assert "does not hold quantization 'none'; use int8" in result.stderr
    assert not (tmp_path / "packed").exists()


def _rewrite(path: Path, **changes: Any) -> None:
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["mhmoe_packed"]) | changes
    kept = {key: value for key, value in header.items() if value is not None}
    save_file(load_file(path), path, {"mhmoe_packed": json.dumps(kept)})


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_flip, "checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable"),
        (lambda path: path.write_bytes(b"hello"), "not a readable"),
        (lambda path: _rewrite(path, version=None), "not written by"),
        (lambda path: _rewrite(path, version=3), "version is 3"),
        (lambda path: _rewrite(path, version=1), "checksum"),
        (lambda path: _rewrite(path, layout="tiles"), "'tiles'"),
        (lambda path: _rewrite(path, format="sign-1bit"), "sign-1bit"),
        (lambda path: _rewrite(path, format="ternary-base3"), "shape"),
        (lambda path: save_file({"x": np.zeros(3)}, path), "not written by"),
        (
            lambda path: path.with_name("model.safetensors").write_bytes(b""),
            "remove one of them",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    mhmoe_here: Run, model: Path, damage: Any, word: str
) -> None:
    path = model / "packed" / "packed.safetensors"
    before = path.read_bytes()
    damage(path)
    if path.read_bytes() != before:
        assert "packed.safetensors: damaged" in mhmoe_here("inspect", "packed", code=2).stderr
        # As if somebody had made it so: what the file itself says is looked at, too.
        reseal(path.parent, path.name)
    result = mhmoe_here("inspect", "packed", code=2)
    assert result.stderr.count("\n") == 1
    assert word in result.stderr, result.stderr


def test_a_missing_file_is_named(mhmoe_here: Run, model: Path) -> None:
    (model / "packed" / "packed.safetensors").unlink()
    assert "packed.safetensors: no such file" in mhmoe_here("inspect", "packed", code=2).stderr


def test_a_packed_file_of_version_1_is_read(mhmoe_here: Run, model: Path) -> None:
    path = model / "packed" / "packed.safetensors"
    expected = mhmoe_here("inspect", "packed").stdout
    tensors = load_file(path)
    _rewrite(path, version=1, sha256=packed_file._checksum(tensors))
    (model / "packed" / "checksums.json").unlink()  # that release wrote none
    assert mhmoe_here("inspect", "packed").stdout == expected


def test_a_packed_file_beside_a_float_configuration_is_refused(mhmoe_here: Run, model: Path) -> None:
    path = model / "packed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization": "none", "use_sub_norm": False}))
    reseal(path.parent, path.name)
    assert "'none'" in mhmoe_here("inspect", "packed", code=2).stderr


def test_a_saved_float_checkpoint_is_still_read_as_such(tmp_path: Path) -> None:
    config, ops = _config("dense-ternary"), load_operations("numpy")
    save_model(tmp_path, _parameters(config), None)
    model = load_model(tmp_path, np.float32, ops=ops)
    assert not any(isinstance(weight, PackedWeight) for weight in model.weights.arrays.values())
