"""Whole models on the cuda backend, against `numpy`: training, traces, scores and decoding."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit.models import BASE, KINDS, QUANTISED
from mhmoe_np.audit.trace import trace
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.packed import pack_weights
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations.checked import Checked
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numpy_ref import quantise
from mhmoe_np.operations.table import Operations
from tests.cuda.backend import cuda_operations, on_the_device
from tests.whole_models import SETTINGS, batches_of, learner_of, parameters_of

NUMPY = load_operations("numpy")
# With 2 and 3 heads, shared expert, capacity, and both BitNet forms.
LONG = ["mh3-shared-sub-norm", "mh2-capacity", "mh2-ternary", "mh3-sign"]
# A quantised head layer without a bias hands on integers times one scale: half of the largest is a tie
# of the next quantiser, with any seed [D9].
UNTIED = {"mh2-ternary-projections": {"moe_projection_bias": True}}

pytestmark = on_the_device


def all_of(kind: str, ops: Operations, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """What training, a trace, a score and decoding come to."""
    learner = learner_of(kind, ops, dtype, seed, **UNTIED.get(kind, {}))
    rng = np.random.default_rng(0)
    config = learner.model.config
    found: dict[str, Any] = {}
    for step in range(2):
        result = learner.step(batches_of(config, rng), SETTINGS)
        assert result.is_finite
        found |= {f"{step} {name}": value for name, value in result.losses._asdict().items()}
        found[f"{step} norm"] = result.gradient_norm
        for layer, statistics in enumerate(result.statistics):
            found |= {f"{step} {layer} {k}": v for k, v in statistics._asdict().items()}
        found |= {f"{step} {name}": np.array(counts) for name, counts in result.matrices.items()}
    found |= learner.parameters.to_host(ops).tensors
    tokens = rng.integers(0, config.vocab_size, (2, 10))
    tokens[1, 7:] = -100
    traced = trace(learner.model, tokens, gradients=True, ops=ops)
    found |= {f"trace {name}": tensor for name, tensor in traced.items()}
    stream = rng.integers(0, config.vocab_size, 50)
    found["score"] = score_stream(learner.model, stream, window=16, batch_tokens=32, ops=ops)
    cache = KeyValueCache(learner.model, sequences=2, positions=12, ops=ops)
    for T in (5, 1, 1, 1):
        with ops.scope():
            found[f"decode {cache.length}"] = ops.to_host(cache.extend(tokens[:2, :T].clip(0)))
    return found


def worst(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number of the tensor."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not expected.size:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6))


def clear_of_ties(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """A seed with which no activation lies where its last bits decide what it rounds to [D9].

    And what `all_of` comes to by the definition, in float64.
    """
    margins: list[float] = []

    def watched(x_NI: Any) -> Any:
        q_NI, scale_N = quantise.quantise_rows(x_NI)
        scaled = np.abs(x_NI / scale_N[:, None])
        margins.append(float(np.abs(scaled % 1 - 0.5).min(initial=1.0)))
        return q_NI, scale_N

    with monkeypatch.context() as patch:
        # A module under a name that its package gives to a function.
        module = import_module("mhmoe_np.operations.numpy_ref.linear")
        patch.setattr(module, "quantise_rows", watched)
        for seed in range(40):
            margins.clear()
            expected = all_of(kind, NUMPY, np.float64, seed)
            if min(margins, default=1.0) > 1e-9:
                return seed, expected
    raise AssertionError(f"{kind}: every seed has ties")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_traces_scores_and_decodes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where no rounding decides which expert is chosen or to what a quantiser rounds."""
    seed, expected = clear_of_ties(kind, monkeypatch)
    ops = cast(Operations, Checked(cuda_operations(keep_buffers=True)))
    actual = all_of(kind, ops, np.float64, seed)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert worst(actual[name], value) < 1e-8, name


@pytest.mark.parametrize("kind", LONG)
def test_twenty_steps_come_to_the_same_parameters(kind: str) -> None:
    backends = cuda_operations(keep_buffers=True), NUMPY
    learners = [learner_of(kind, ops, seed=2) for ops in backends]
    rngs = [np.random.default_rng(3) for _ in learners]
    settings = SETTINGS
    if kind in QUANTISED:
        # Somewhere one last bit may decide what an activation rounds to [D9]: short steps, few tokens.
        settings = SETTINGS._replace(learning_rate=2e-4)
    for _ in range(20):
        for learner, rng in zip(learners, rngs, strict=True):
            batches = batches_of(learner.model.config, rng)
            learner.step([Batch(*(ids[:1] for ids in batch)) for batch in batches], settings)
    cuda, numpy = learners
    expected = numpy.parameters.tensors
    for name, tensor in cuda.parameters.to_host(backends[0]).tensors.items():
        assert worst(tensor, expected[name]) < 1e-4, name


@pytest.mark.parametrize("kind", QUANTISED)
def test_packed_logits_have_the_bits_of_quantised_floats(kind: str) -> None:
    ops = cuda_operations()
    parameters = parameters_of(kind).to_device(ops)
    config = parameters.config
    ids = ops.to_device(np.random.default_rng(2).integers(0, config.vocab_size, (2, 9)))
    floats = Model.of(parameters, ops=ops)
    outputs = [forward(floats, ids, None, drop=False, ops=ops)[0]]
    for format in formats_for(config):
        model = Model.with_weights(config, pack_weights(parameters, format, ops=ops), ops=ops)
        outputs.append(forward(model, ids, None, drop=False, ops=ops)[0])
    bits = {ops.to_host(y_ND).tobytes() for y_ND in outputs}
    assert len(bits) == 1


@pytest.mark.parametrize("kind", LONG)
def test_evaluation_and_decoding_agree(kind: str) -> None:
    backends = [cuda_operations(keep_buffers=True), NUMPY]
    models = [Model.of(parameters_of(kind).to_device(ops), ops=ops) for ops in backends]
    stream = np.random.default_rng(4).integers(0, BASE["vocab_size"], 100)
    scores = [
        score_stream(model, stream, window=16, batch_tokens=48, ops=ops)
        for model, ops in zip(models, backends, strict=True)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    logits: list[list[Any]] = [[], []]
    for model, ops, found in zip(models, backends, logits, strict=True):
        cache = KeyValueCache(model, sequences=1, positions=16, ops=ops)
        for first, last in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 12)):
            with ops.scope():
                found.append(ops.to_host(cache.extend(stream[None, first:last])))
    for actual, expected in zip(*logits, strict=True):
        assert worst(actual, expected) < 1e-5
