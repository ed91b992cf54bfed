"""The folder of vectors: as shipped with this version, or computed anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from mhmoe_np.checkpoints.checkpoint import write_model_files
from mhmoe_np.conformance.catalogue import all_vectors
from mhmoe_np.conformance.index import Known, index_of
from mhmoe_np.conformance.model_vectors import filled, tokens_of
from mhmoe_np.operations.load import load_operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.files import write_text
from mhmoe_np.storage.tensors import write_tensors

SHIPPED = Path(__file__).parent / "vectors"
INDEX = "index.json"
WRITTEN_BY_HAND = "README.md", "check_vectors.py"


def copy_shipped(directory: Path) -> None:
    """Copy this version's vectors into an empty directory.

    Raises OSError: the disk is full or refuses.
    """
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SHIPPED, directory, dirs_exist_ok=True, ignore=unwanted)


def compute_anew(directory: Path, on_progress: OnProgress = unseen) -> None:
    """Compute all vectors by the definition, in float64, into an empty directory.

    The files differ from the shipped ones in last bits, where the processor or the libraries do.
    on_progress: counts vectors.

    Raises OSError: the disk is full or refuses.
    """
    ops = load_operations("numpy")
    known: list[Known] = []
    expected = count(SHIPPED)
    for vector in all_vectors():
        on_progress("computing", len(known), expected)
        known.append(Known.of(vector, ops))
    for each in known:
        _write(directory, each)
    write_text(directory / INDEX, index_of(known))
    for name in WRITTEN_BY_HAND:
        shutil.copyfile(SHIPPED / name, directory / name)


def count(directory: Path) -> int:
    """How many vectors a folder holds."""
    return len(json.loads((directory / INDEX).read_text(encoding="utf-8"))["vectors"])


def _write(directory: Path, known: Known) -> None:
    vector, tensors = known.vector, known.outcome.tensors
    place = directory / vector.name
    if vector.subject != "model":
        place.parent.mkdir(exist_ok=True)
        file = place.with_name(f"{place.name}.safetensors")
        write_tensors(file, {**vector.arguments, **vector.upstream, **tensors})
        return
    place.mkdir(parents=True)
    config = ModelConfig.model_validate(vector.options)
    write_model_files(place, filled(config, vector.arguments, np.float32), None)
    tokens = tokens_of(vector.arguments)
    write_text(place / "tokens.json", json.dumps(tokens.tolist()) + "\n")
    ids = {name: vector.arguments[name] for name in ("input_ids", "target_ids")}
    write_tensors(place / "trace.safetensors", {**ids, **tensors})
