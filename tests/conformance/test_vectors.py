"""The shipped vectors: they cover everything, hold here and elsewhere, and are near no tie."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mhmoe_np.audit.models import KINDS
from mhmoe_np.conformance import folder as vector_folder
from mhmoe_np.conformance.catalogue import all_vectors
from mhmoe_np.conformance.folder import INDEX, SHIPPED
from mhmoe_np.conformance.index import Known, in_order, index_of
from mhmoe_np.conformance.model_vectors import SMALL, tokens_of
from mhmoe_np.conformance.tolerance import disturbed, recorded, tolerances
from mhmoe_np.conformance.vector import Vector
from mhmoe_np.operations.door import promises
from mhmoe_np.operations.load import load_operations
from tests.conformance.ours import blas_architectures, write
from tests.conformance.results import VECTORS, checked, expected, tensors_of
from tests.conftest import Run

NUMPY = load_operations("numpy")
ROOT = Path(__file__).parents[2]
MOST_BYTES = 5_000_000
LOOSEST = 4e-3  # a tolerance in float32, of the largest number of its tensor
FOUR_ROUNDINGS = 2.0**-22  # of float32


@pytest.fixture(scope="module")
def vectors() -> dict[str, Vector]:
    return {vector.name: vector for vector in all_vectors()}


def shipped_tolerances(name: str) -> dict[str, Any]:
    specs = VECTORS[name]["tensors"]
    return {key: spec["tolerance"] for key, spec in specs.items() if "tolerance" in spec}


# ---- what there is ---------------------------------------------------------------------------


def test_every_operation_of_the_table_has_a_vector() -> None:
    assert {name for entry in VECTORS.values() for name in entry["operations"]} == set(promises())
    # Not by a layer or a model alone: each by itself.
    small = [
        entry for name, entry in VECTORS.items() if name.split("/")[0] not in ("model", "moe_layer")
    ]
    assert {name for entry in small for name in entry["operations"]} == set(promises())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_a_vector(kind: str) -> None:
    options = VECTORS[f"model/{kind}"]["options"]
    own = {key: value for key, value in KINDS[kind].items() if key not in SMALL}
    assert own.items() <= options.items()


def test_every_gradient_is_there() -> None:
    for name in VECTORS:
        if name.startswith("model/"):
            weights = load_file(SHIPPED / name / "model.safetensors")
            gradients = {key for key in expected(name) if key.startswith("grad.")}
            assert gradients == {f"grad.{tensor}" for tensor in weights}


def test_they_are_small_and_finite() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < MOST_BYTES
    for name in VECTORS:
        for tensor in expected(name).values():
            assert np.isfinite(tensor).all(), name


# ---- they are what the code says -------------------------------------------------------------


def test_the_index_says_what_docstrings_and_catalogue_say(vectors: dict[str, Vector]) -> None:
    """With the tolerances as shipped: they are derived below."""
    known = []
    for name, vector in vectors.items():
        outcome, called = recorded(vector, NUMPY)
        known.append(Known(vector, outcome, in_order(called), shipped_tolerances(name)))
    assert index_of(known) == (SHIPPED / INDEX).read_text(encoding="utf-8")


def test_arguments_are_equal_to_the_bit(vectors: dict[str, Vector]) -> None:
    for name, vector in vectors.items():
        found = tensors_of(name)
        if vector.subject == "model":
            found |= load_file(SHIPPED / name / "model.safetensors")
            assert json.loads((SHIPPED / name / "config.json").read_text()) == vector.options
            tokens = json.loads((SHIPPED / name / "tokens.json").read_text())
            assert tokens == tokens_of(vector.arguments).tolist()
        for key, array in {**vector.arguments, **vector.upstream}.items():
            assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), name
            assert found[key].tobytes() == np.ascontiguousarray(array).tobytes(), (name, key)


def test_no_file_is_left_over(vectors: dict[str, Vector]) -> None:
    files = {INDEX, *vector_folder.WRITTEN_BY_HAND}
    for name, entry in VECTORS.items():
        files.add(entry["file"])
        if name.startswith("model/"):
            files |= {f"{name}/{file}" for file in ("config.json", "model.safetensors", "tokens.json")}
    found = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*") if path.is_file()}
    assert {name for name in found if "__pycache__" not in name} == files


def test_tolerances_are_derived(vectors: dict[str, Vector]) -> None:
    for name in list(vectors)[::8]:
        vector = vectors[name]
        derived = tolerances(vector, vector.outcome(NUMPY, np.float64), NUMPY)
        for key, shipped in shipped_tolerances(name).items():
            for kind, value in shipped.items():
                # They are rounded up to two digits, at whose edge last bits decide.
                assert derived[key][kind] == pytest.approx(value, rel=0.11), (name, key)


def test_no_tolerance_is_loose() -> None:
    for name in VECTORS:
        tensors = expected(name)
        for key, tolerance in shipped_tolerances(name).items():
            largest = float(np.abs(tensors[key]).max(initial=0))
            # What is 0 but for roundings, as a score's gradient where there is one key, has no size.
            if largest > 1e-12:
                assert tolerance["float32"] <= LOOSEST * largest, (name, key)


def test_nothing_flips_under_four_roundings_of_float32(vectors: dict[str, Vector]) -> None:
    """No choice and no quantiser is that near a tie, unless it lies on one in few bits [D9]."""
    for name, vector in vectors.items():
        moved = disturbed(vector, NUMPY, part=FOUR_ROUNDINGS, trial=1000).tensors
        allowed = shipped_tolerances(name)
        for key, tensor in expected(name).items():
            tolerance = allowed.get(key, {"float32": 0.0})["float32"]
            assert np.abs(moved[key] - tensor).max(initial=0) <= tolerance, (name, key)


# ---- they hold -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"), [("numpy", "float32"), ("numba", "float64"), ("numba", "float32")]
)
def test_the_backends_pass(backend: Any, dtype: str, tmp_path: Path) -> None:
    write(load_operations(backend), dtype, tmp_path)
    assert checked(tmp_path).endswith(f"{len(VECTORS)} of {len(VECTORS)} vectors pass\n")


def test_they_hold_with_the_products_of_another_processor(tmp_path: Path) -> None:
    """OpenBLAS sums in another order there."""
    if not blas_architectures() or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs OpenBLAS on an x86 processor")
    command = [sys.executable, "-m", "tests.conformance.ours", "numpy", "float64", str(tmp_path)]
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) != blas_architectures()  # or it had no effect
    checked(tmp_path)


# ---- the command -----------------------------------------------------------------------------


def test_a_models_vector_is_a_checkpoint_and_a_trace(mhmoe_here: Run, tmp_path: Path) -> None:
    """A port that reads the one and writes the other has nothing to add."""
    (tmp_path / "model").mkdir()
    for name in ("model/mh2-shared", "model/mh3-ternary-shared-capacity"):
        place = SHIPPED / name
        tokens, out = place / "tokens.json", f"{name}.safetensors"
        mhmoe_here("trace", place, "--tokens", tokens, "--out", out, "--backend", "numpy")
        checked(tmp_path, name)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_the_command_writes_the_shipped_ones(mhmoe_here: Run, tmp_path: Path) -> None:
    printed = mhmoe_here("vectors", "--out", "vectors").stdout
    assert printed.startswith(f"vectors: {len(VECTORS)} vectors; ")
    assert contents(tmp_path / "vectors") == contents(SHIPPED)
    said = mhmoe_here("vectors", "--out", "vectors", code=2).stderr
    assert said == "mhmoe-np: vectors: exists already; choose another --out\n"


def test_the_command_computes_them_anew(
    mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: dict[str, Vector]
) -> None:
    """A few, for time."""
    few = ["linear/bitnet_b158-ties", "route/ties", "moe_layer/mh2", "model/mh2-capacity"]
    monkeypatch.setattr(vector_folder, "all_vectors", lambda: [vectors[name] for name in few])
    assert mhmoe_here("vectors", "--fresh", "--out", "fresh").stdout.startswith("fresh: 4 vectors")
    fresh = tmp_path / "fresh"
    index = json.loads((fresh / INDEX).read_text())["vectors"]
    results = tmp_path / "results"
    for name in few:
        assert index[name].keys() == VECTORS[name].keys()
        for file in contents(SHIPPED):
            if file.startswith(f"{name}.") or file.startswith(f"{name}/"):
                assert (fresh / file).is_file()
        # A fresh folder's vector and a port's results are files of the same names.
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        found = load_file(fresh / index[name]["file"])
        assert found.keys() == tensors_of(name).keys()
        np.savez(results / f"{name}.npz", **found)
        checked(results, name)
    checked(results, script=fresh)
