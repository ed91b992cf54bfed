"""Float weights that are used where they lie in their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.checkpoints.checkpoint import WEIGHTS, load_model, save_model
from mhmoe_np.errors import Damaged
from mhmoe_np.model.weights import Weights, floats
from mhmoe_np.operations.load import load_operations
from mhmoe_np.storage.checksums import CHECKSUMS
from tests.whole_models import parameters_of

OPS = load_operations("numpy")
KINDS = ["dense-relu2-sub-norm-untied", "smoe", "mh2-bias", "mh3-shared-sub-norm"]


def loaded(folder: Path, dtype: Any = np.float32) -> Weights:
    return load_model(folder, dtype, ops=OPS).weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("written", [np.float32, np.float64])
def test_every_array_is_what_was_written(kind: str, dtype: Any, written: Any, tmp_path: Path) -> None:
    parameters = parameters_of(kind, written)
    save_model(tmp_path, parameters, None)
    arrays = loaded(tmp_path, dtype).arrays
    assert list(arrays) == list(parameters.arrays)
    for name, array in arrays.items():
        numbers = floats(array)
        assert (numbers.dtype, numbers.flags.c_contiguous) == (dtype, True), name
        np.testing.assert_array_equal(numbers, parameters.arrays[name].astype(dtype), name)


def test_arrays_whose_tensors_adjoin_are_the_files_own_pages(tmp_path: Path) -> None:
    parameters = parameters_of("dense")
    save_model(tmp_path, parameters, None)
    arrays = loaded(tmp_path).arrays
    size = (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        file.write(bytes(size - header))
    mapped = {name.partition("0.")[2] for name, array in arrays.items() if not floats(array).any()}
    every = {name.partition("0.")[2] for name in arrays}
    assert every - mapped == {"self_attn.qkv_proj.weight"}  # beside k lies o


def test_what_is_written_to_one_stays_in_the_process(tmp_path: Path) -> None:
    save_model(tmp_path, parameters_of("dense"), None)
    before = (tmp_path / WEIGHTS).read_bytes()
    loaded(tmp_path).embedding_VD[...] = 7
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_tensors_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    parameters = parameters_of("smoe")
    save_model(tmp_path, parameters, None)
    content = (tmp_path / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    longer = (end - 8 + 1).to_bytes(8, "little") + content[8:end] + b" " + content[end:]
    (tmp_path / WEIGHTS).write_bytes(longer)
    (tmp_path / CHECKSUMS).unlink()
    for name, array in loaded(tmp_path).arrays.items():
        assert floats(array).flags.aligned, name
        np.testing.assert_array_equal(floats(array), parameters.arrays[name], name)


@pytest.mark.parametrize("tensor", ["self_attn.q_proj", "mlp.gate_proj"])  # a copied one, a mapped one
def test_a_number_that_is_not_finite_is_refused(tensor: str, tmp_path: Path) -> None:
    parameters = parameters_of("dense")
    parameters.tensors[f"model.layers.0.{tensor}.weight"][-1, -1] = np.nan
    save_model(tmp_path, parameters, None)
    with pytest.raises(Damaged, match=rf"{tensor}\.weight' holds numbers that are not finite"):
        loaded(tmp_path)


def test_a_number_that_is_none_of_the_narrower_type_is_refused(tmp_path: Path) -> None:
    parameters = parameters_of("dense", np.float64)
    parameters.tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = 1e300
    save_model(tmp_path, parameters, None)
    assert loaded(tmp_path, np.float64).blocks
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(Damaged, match=r"gate_proj\.weight' holds numbers that are not finite"),
    ):
        loaded(tmp_path)
