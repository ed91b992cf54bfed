"""A step of decoding that a backend joins into one piece of work is the step of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhmoe_np.model.decode import KeyValueCache, branches_of
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.packed import pack_int8, pack_weights
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu.joined_step import MOST_SEQUENCES, POSITIONS
from mhmoe_np.operations.table import Operations
from tests.whole_models import parameters_of

ODD = {
    "hidden_size": 44,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "intermediate_size": 75,
    "max_position_embeddings": 2 * POSITIONS + 9,
}
# Several tasks in every phase.
WIDE = {"hidden_size": 160, "intermediate_size": 1030, "max_position_embeddings": 2 * POSITIONS}


def model_of(kind: str, ops: Operations, dtype: Any = np.float32, **changes: Any) -> Model:
    return Model.of(parameters_of(kind, dtype, **changes).to_device(ops), ops=ops)


def is_joined(model: Model, cache: KeyValueCache, ops: Operations) -> bool:
    branches = branches_of(model.weights.blocks[0], cache.layers[0])
    return ops.joined_step(branches, activation="silu", eps=1e-5) is not None


def decoded(model: Model, ops: Operations, *, sequences: int, prompt: int, steps: int) -> list[Any]:
    """The logits after the prompt and after each further token, and at last keys and values."""
    ids = np.random.default_rng(7).integers(0, model.config.vocab_size, (sequences, prompt + steps))
    cache = KeyValueCache(model, sequences=sequences, positions=prompt + steps, ops=ops)
    found = []
    for first, last in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]:
        with ops.scope():
            found.append(ops.to_host(cache.extend(ids[:, first:last])).copy())
    return [*found, np.array(cache.layers)]


@pytest.mark.parametrize(
    ("kind", "changes", "sequences", "prompt", "steps"),
    [
        ("dense", {}, 1, 1, 6),
        ("dense-grouped-heads", ODD, 1, POSITIONS - 2, 4),
        ("dense-grouped-heads", ODD, 3, 2 * POSITIONS - 1, 3),
        ("dense-one-key-value-head-relu2-sub-norm-untied", {}, 2, 3, 4),
        ("dense-relu2-sub-norm-untied", WIDE, 1, 5, 3),
        ("dense-relu2-sub-norm-untied", WIDE | {"num_hidden_layers": 1}, MOST_SEQUENCES, 5, 3),
        ("smoe", {"num_hidden_layers": 5}, 1, 5, 3),
        ("mh2-shared-sub-norm", {}, 3, 5, 3),
    ],
)
def test_a_joined_step_is_that_of_the_definition(
    kind: str, changes: dict[str, Any], sequences: int, prompt: int, steps: int
) -> None:
    # [spec 2 pre-norm]
    results = []
    for backend in ("numpy", "numba"):
        ops = load_operations(backend, keep_buffers=backend == "numba")
        model = model_of(kind, ops, **changes)
        cache = KeyValueCache(model, sequences=sequences, positions=9, ops=ops)
        assert is_joined(model, cache, ops) == (backend == "numba")
        results.append(decoded(model, ops, sequences=sequences, prompt=prompt, steps=steps))
    for expected, found in zip(*results, strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# Heads and inner width are whole panels; the model's width is none.
PANELS = {"hidden_size": 72, "num_attention_heads": 3, "head_dim": 16}
# Of any number of sequences one is done on one thread, the other on all: each is compiled once.
SMALL, LARGE = PANELS | {"intermediate_size": 272}, PANELS | {"intermediate_size": 1296}


def packed_model(kind: str, ops: Operations) -> Model:
    if kind == "int8":
        parameters = parameters_of("dense-relu2-sub-norm-untied", **SMALL)
        return Model.with_weights(parameters.config, pack_int8(parameters, ops=ops), ops=ops)
    parameters = parameters_of(kind, **LARGE)
    packed = pack_weights(parameters, formats_for(parameters.config)[-1], ops=ops)
    return Model.with_weights(parameters.config, packed, ops=ops)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "dense-ternary"])
def test_packed_weights_are_joined_with_the_same_bits(
    kind: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first position, where attention has nothing to round in another order."""
    ops = load_operations("numba")
    model = packed_model(kind, ops)
    cache = KeyValueCache(model, sequences=sequences, positions=9, ops=ops)
    assert is_joined(model, cache, ops)
    first, *later, _ = decoded(model, ops, sequences=sequences, prompt=1, steps=7)
    monkeypatch.setattr(ops, "joined_step", lambda *_, **__: None)
    expected_first, *expected, _ = decoded(model, ops, sequences=sequences, prompt=1, steps=7)
    assert first.tobytes() == expected_first.tobytes()
    for found, wanted in zip(later, expected, strict=True):
        # A quantiser that sees another last bit may round to the neighbour.
        assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "sequences"), [("dense-ternary", 1), ("dense", MOST_SEQUENCES + 1)])
def test_what_cannot_be_joined_is_left_to_the_operations(kind: str, sequences: int) -> None:
    ops = load_operations("numba")
    model = model_of(kind, ops)
    cache = KeyValueCache(model, sequences=sequences, positions=9, ops=ops)
    assert not is_joined(model, cache, ops)


def test_a_joined_step_has_the_same_bits_at_any_number_of_threads() -> None:
    runs = []
    for threads in (1, 2, 2):
        ops = load_operations("numba", threads=threads)
        model = model_of("dense-relu2-sub-norm-untied", ops, **WIDE)
        runs.append(decoded(model, ops, sequences=3, prompt=1, steps=70))
    first, *others = ([array.tobytes() for array in run] for run in runs)
    assert all(other == first for other in others)
