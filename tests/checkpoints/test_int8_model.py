"""Models in 8-bit integers: of every kind, in memory, on disk, back in floats, and by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mhmoe_np.audit.models import settings
from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints import packed_file
from mhmoe_np.checkpoints.checkpoint import load_model, save_packed_model
from mhmoe_np.errors import UserError
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.packed import pack_int8, unpack_int8
from mhmoe_np.model.weights import quantised_anew
from mhmoe_np.operations.int8 import Int8Weight, from_int8
from mhmoe_np.operations.load import load_operations
from mhmoe_np.storage.checksums import reseal
from tests.conftest import Run
from tests.whole_models import parameters_of

OPS = load_operations("numpy")
TOKENS = np.random.default_rng(9).integers(0, 37, (3, 20))
KINDS = ["dense-relu2-sub-norm-untied", "smoe", "mh2-bias", "mh3-shared-sub-norm"]
BITNET = ["mh2-ternary-shared-capacity", "mh2-sign-projections-bias"]
NUMPY = ("--backend", "numpy")


@pytest.mark.parametrize("kind", [*KINDS, *BITNET])
def test_every_linear_map_but_router_and_head_is_in_8_bits(kind: str) -> None:
    # [spec 5 8-bit weights]
    parameters = parameters_of(kind)
    weights = pack_int8(parameters, ops=OPS)
    acting = quantised_anew(parameters, packed=False, ops=OPS)
    for entry in parameters.table:
        weight = weights.arrays[entry.name]
        matrix = entry.parts[0].tensor.endswith("_proj.weight")
        assert isinstance(weight, Int8Weight) == matrix, entry.name
        if isinstance(weight, Int8Weight):
            whole: Any = acting.arrays[entry.name]
            floats = whole if isinstance(whole, np.ndarray) else whole.w * whole.beta[..., None]
            off = np.abs(from_int8(weight).reshape(entry.shape) - floats)
            assert off.max() <= np.abs(floats).max() / 253
        else:
            assert np.shares_memory(weight, parameters.flat_P)


@pytest.mark.parametrize("kind", [*KINDS, *BITNET])
def test_logits_are_near_those_of_the_floats(kind: str) -> None:
    parameters = parameters_of(kind)
    model = Model.of(parameters, ops=OPS)
    packed = Model.with_weights(parameters.config, pack_int8(parameters, ops=OPS), ops=OPS)
    expected, found = (
        trace(one, TOKENS, gradients=False, ops=OPS)["logits"] for one in (model, packed)
    )
    # A router between two experts may take the other one: such tokens are few.
    off = np.median(np.abs(found - expected)) / np.sqrt(np.mean(expected**2))
    assert 0 < off < 0.05
    nll = [
        score_stream(one, TOKENS.ravel(), window=19, batch_tokens=38, ops=OPS)
        for one in (model, packed)
    ]
    np.testing.assert_allclose(nll[1], nll[0], rtol=0.01)


def test_the_backends_agree_and_a_cache_changes_nothing() -> None:
    parameters = parameters_of("mh3-shared-sub-norm")
    weights, logits = pack_int8(parameters, ops=OPS), []
    for ops in (OPS, load_operations("numba")):
        model = Model.with_weights(parameters.config, weights.to_device(ops), ops=ops)
        cache = KeyValueCache(model, sequences=3, positions=20, ops=ops)
        steps = [cache.extend(TOKENS[:, t : t + 1]).copy() for t in range(20)]
        whole = trace(model, np.pad(TOKENS, ((0, 0), (0, 1))), gradients=False, ops=ops)["logits"]
        logits += [np.stack(steps, axis=1), whole]
    for found in logits[1:]:
        # An activation may round to the other neighbour: one step of 1/127 of its block's largest.
        assert np.abs(found - logits[0]).max() <= 0.02 * np.abs(logits[0]).max()


@pytest.mark.parametrize("kind", ["mh2-bias", "mh2-ternary-shared-capacity"])
def test_what_is_loaded_is_what_was_packed(kind: str, tmp_path: Path) -> None:
    parameters = parameters_of(kind)
    weights = pack_int8(parameters, ops=OPS)
    save_packed_model(tmp_path, parameters.config, weights, None)
    model = load_model(tmp_path, np.float32, ops=OPS)
    for name, weight in weights.arrays.items():
        loaded = model.weights.arrays[name]
        if isinstance(weight, Int8Weight):
            assert isinstance(loaded, Int8Weight)
            assert loaded.q.tobytes() == weight.q.tobytes()
            assert loaded.scale.tobytes() == weight.scale.tobytes()
            assert loaded.q.ctypes.data % 64 == 0
        else:
            np.testing.assert_array_equal(loaded, weight)


def test_unpacked_and_packed_again_it_is_the_same_file(tmp_path: Path) -> None:
    parameters = parameters_of("mh2-bias")
    weights = pack_int8(parameters, ops=OPS)
    floats = unpack_int8(parameters.config, weights, ops=OPS)
    down = "model.layers.1.mlp.experts.down_proj.weight"
    packed: Any = weights.arrays[down]
    np.testing.assert_array_equal(floats.arrays[down], from_int8(packed))
    files = []
    for name, one in (("a", weights), ("b", pack_int8(floats, ops=OPS))):
        (tmp_path / name).mkdir()
        save_packed_model(tmp_path / name, parameters.config, one, None)
        files.append((tmp_path / name / "packed.safetensors").read_bytes())
    assert files[0] == files[1]


def test_weights_beyond_the_scales_are_named() -> None:
    parameters = parameters_of("dense")
    parameters.tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = 1e8
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.qkv_proj\.weight: has weights beyond"):
        pack_int8(parameters, ops=OPS)


# ---- the commands ----------------------------------------------------------------------------


@pytest.fixture
def model(mhmoe_here: Run, tmp_path: Path) -> Path:
    """A checkpoint `model`, its packed form `packed`, and `tokens.npy`."""
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2-bias")))
    np.save(tmp_path / "tokens.npy", TOKENS)
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 4)
    printed = mhmoe_here("pack", "model", "--out", "packed", *NUMPY).stdout
    assert "packed: int8" in printed
    return tmp_path


def test_pack_inspect_trace_unpack(mhmoe_here: Run, model: Path) -> None:
    again = mhmoe_here("pack", "model", "--format", "int8", "--out", "again", "--json", *NUMPY)
    sizes = json.loads(again.stdout)
    assert sizes["format"] == "int8"
    assert sizes["sizes"]["quantised"]["bits_per_weight"] > 8
    files = [(model / name / "packed.safetensors").read_bytes() for name in ("packed", "again")]
    assert files[0] == files[1]

    rows = {
        row["name"]: row for row in json.loads(mhmoe_here("inspect", "packed", "--json", *NUMPY).stdout)
    }
    assert rows["model.layers.1.mlp.experts.3.down_proj.weight"]["format"] == "int8"
    assert rows["model.layers.1.mlp.experts.3.down_proj.weight"]["scale"] is None
    assert rows["model.layers.0.mlp.gate.weight"]["format"] == "float32"
    assert rows["model.embed_tokens.weight"]["format"] == "float32"

    mhmoe_here("unpack", "packed", "--out", "floats", *NUMPY)
    found = {}
    for name in ("model", "packed", "floats"):
        out = f"{name}.safetensors"
        arguments = ("--tokens", "tokens.npy", "--out", out, "--no-grad", "--operations")
        mhmoe_here("trace", name, *arguments, *NUMPY)
        found[name] = load_file(model / out)
    size = np.abs(found["model"]["logits"]).max()
    for name in ("packed", "floats"):
        assert 0 < np.abs(found[name]["logits"] - found["model"]["logits"]).max() < 0.1 * size
    assert mhmoe_here("trace", "packed", "--tokens", "tokens.npy", "--out", "new", code=2).stderr


def test_a_bitnet_model_is_packed_to_8_bits_and_not_unpacked(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2-ternary")))
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 4)
    assert "int8" in mhmoe_here("pack", "model", "--out", "eight", "--format", "int8", *NUMPY).stdout
    assert "ternary-2bit" in mhmoe_here("pack", "model", "--out", "two", *NUMPY).stdout
    result = mhmoe_here("unpack", "eight", "--out", "floats", *NUMPY, code=2)
    assert result.stderr.count("\n") == 1
    assert "'bitnet_b158'" in result.stderr
    assert "unpack what it was packed from" in result.stderr
    assert not (tmp_path / "floats").exists()


def _resaved(path: Path, change: Any) -> None:
    """The file with other tensors, whose checksum is right."""
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["mhmoe_packed"])
    tensors = change(load_file(path))
    said = header["version"], header["layout"], header["format"]
    header["sha256"] = packed_file._checksum(tensors, *said)
    save_file(tensors, path, {"mhmoe_packed": json.dumps(header)})
    reseal(path.parent, path.name)


DOWN = "model.layers.1.mlp.experts.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors | {f"{DOWN}_scale": -tensors[f"{DOWN}_scale"]}, "negative scales"),
        (lambda tensors: tensors | {f"{DOWN}_scale": tensors[f"{DOWN}_scale"] * np.inf}, "finite"),
        (lambda tensors: tensors | {DOWN: tensors[DOWN].view(np.uint8)}, "needs I8"),
        (lambda tensors: tensors | {DOWN: tensors[DOWN][:, :, :4]}, "shape"),
        (lambda tensors: {name: t for name, t in tensors.items() if name != DOWN}, "lacks"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(
    mhmoe_here: Run, model: Path, change: Any, word: str
) -> None:
    with np.errstate(invalid="ignore"):
        _resaved(model / "packed" / "packed.safetensors", change)
    result = mhmoe_here("inspect", "packed", *NUMPY, code=2)
    assert result.stderr.count("\n") == 1
    assert word in result.stderr, result.stderr
