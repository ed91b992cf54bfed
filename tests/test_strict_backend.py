"""Everything the package does with a model runs on arrays that only the table's operations touch.

This is what keeps a third backend possible. The strict arrays are computed with by `numpy_ref`, so
every result must have the bits of the `numpy` backend.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit import gradcheck
from mhmoe_np.audit.models import KINDS, QUANTISED, settings
from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints.checkpoint import load_model, save_model, save_packed_model
from mhmoe_np.data.tokenizer import load_tokenizer
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.inference.generate import generate
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.packed import pack_weights, unpack_weights
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.checked import BrokenPromise, Checked
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.run import parse_run_config
from mhmoe_np.training.preparation import create_run_folder
from mhmoe_np.training.trainer import Trainer
from tests.strict_backend import NotOnTheDevice, StrictArray, StrictOperations, strict_operations
from tests.whole_models import SETTINGS, batches_of, config_of, learner_of, parameters_of

STATE_FILES = ("model.safetensors", "optimizer.safetensors")
NUMPY = cast(Operations, numpy_ref)


def _all_of(kind: str, ops: Operations) -> list[Any]:
    """Training, trace, evaluation and decoding: everything that came out."""
    learner, rng = learner_of(kind, ops), np.random.default_rng(0)
    config = learner.model.config
    found: list[Any] = []
    for micro_batches in (batches_of(config, rng), batches_of(config, rng)[:1]):
        result = learner.step(micro_batches, SETTINGS)
        found += [*result.losses, result.gradient_norm, *result.matrices.values()]
        found += [part for layer in result.statistics for part in layer]
    found += [learner.parameters.to_host(ops).flat_P, learner.moments.second.to_host(ops).flat_P]
    tokens = rng.integers(0, config.vocab_size, (2, 10))
    tokens[1, 7:] = -100
    traced = trace(learner.model, tokens, gradients=True, ops=ops)
    found += [(name, tensor) for name, tensor in traced.items()]
    stream = rng.integers(0, config.vocab_size, 50)
    found.append(score_stream(learner.model, stream, window=16, batch_tokens=32, ops=ops))
    cache = KeyValueCache(learner.model, sequences=2, positions=12, ops=ops)
    for T in (5, 1, 1):
        found.append(ops.to_host(cache.extend(tokens[:2, :T].clip(0))))
    return found


def _same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()
    if isinstance(expected, tuple):
        return len(actual) == len(expected) and all(map(_same, actual, expected))
    return bool(actual == expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_traces_scores_and_decodes_with_the_same_bits(kind: str) -> None:
    ops, _ = strict_operations()
    actual, expected = _all_of(kind, ops), _all_of(kind, NUMPY)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert _same(a, e), (a, e)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_backend_that_prefers_packed_weights_packs_them_in_its_own_layout(kind: str) -> None:
    actual = _all_of(kind, strict_operations(prefers_packed=True)[0])
    for a, e in zip(actual, _all_of(kind, NUMPY), strict=True):
        assert _same(a, e), (a, e)


@pytest.mark.parametrize("kind", ["dense", "mh2-shared", "mh2-ternary-shared-capacity"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_read_once(kind: str, parts: int) -> None:
    ops, strict = strict_operations(prefers_packed=True)
    learner, rng = learner_of(kind, ops), np.random.default_rng(1)
    for _ in range(2):
        strict.doors = Counter()
        learner.step(batches_of(learner.model.config, rng)[:parts], SETTINGS)
        assert strict.doors["to_host"] == 1
        assert strict.doors["packed_to_host"] == strict.doors["packed_to_device"] == 0


@pytest.mark.parametrize("kind", ["dense-ternary", "mh2-ternary-projections", "mh3-sign"])
def test_packed_models_are_packed_run_saved_and_unpacked(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    format = formats_for(config)[0]
    outcomes = []
    for name, ops in (("numpy", NUMPY), ("strict", strict_operations()[0])):
        weights = pack_weights(parameters_of(kind).to_device(ops), format, ops=ops)
        folder = tmp_path / name
        folder.mkdir()
        save_packed_model(folder, config, weights.to_host(ops), None)
        model = load_model(folder, np.float32, ops=ops)
        ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 7))
        y_ND, _ = forward(model, ops.to_device(ids), None, drop=False, ops=ops)
        floats = unpack_weights(config, model.weights, ops=ops)
        files = [path.read_bytes() for path in sorted(folder.iterdir())]
        outcomes.append((ops.to_host(y_ND), floats.flat_P, files))
    for actual, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert _same(actual, expected)


def test_a_checkpoint_is_saved_and_loaded(tmp_path: Path) -> None:
    ops, _ = strict_operations()
    learner = learner_of("mh2-shared", ops)
    learner.step(batches_of(learner.model.config, np.random.default_rng(3)), SETTINGS)
    host = learner.parameters.to_host(ops)
    save_model(tmp_path, host, None)
    loaded = load_model(tmp_path, np.float32, ops=ops).weights.to_host(ops)
    for name, array in host.arrays.items():
        assert _same(loaded.arrays[name], array)


@pytest.mark.parametrize("quantization", ["none", "bitnet_b158"])
def test_a_run_trains_stops_resumes_and_generates(tmp_path: Path, quantization: str) -> None:
    text = tmp_path / "text.txt"
    words = np.random.default_rng(4).choice(["a", "whale", "the", "sea"], 3000)
    text.write_text(" ".join(words))
    tables = {
        "model": settings("mh2-shared") | {"vocab_size": 270, "quantization": quantization},
        "data": {"paths": [str(text)]},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "sequence_length": 16,
            "checkpoint_every": 2,
        },
    }
    config = parse_run_config(cast(Any, tables), source="test")
    metrics = []
    for name, ops in (("numpy", NUMPY), ("strict", strict_operations()[0])):
        run = tmp_path / name
        create_run_folder(run, config, threads=1, ops=load_operations("numpy"))
        Trainer(run, config, ops).train(lambda report: None)
        last = run / "checkpoints" / "step-00000004"
        final = [(last / file).read_bytes() for file in STATE_FILES]
        for path in sorted(last.iterdir()):
            path.unlink()
        last.rmdir()
        resumed = Trainer(run, config, ops)
        assert resumed.step == 2
        resumed.train(lambda report: None)
        assert [(last / file).read_bytes() for file in STATE_FILES] == final
        tokenizer = load_tokenizer(run / "tokenizer.json")
        sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=1)
        model = resumed.learner.model
        pieces = generate(model, tokenizer, "the sea", max_new_tokens=8, sampling=sampling, ops=ops)
        metrics.append((final, "".join(pieces)))
    assert metrics[0] == metrics[1]


def test_gradcheck_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one model; every kind trains and traces above."""
    monkeypatch.setattr(gradcheck, "KINDS", ["mh2-ternary-shared-capacity"])
    checks = list(gradcheck.check_all(strict_operations()[0]))
    assert len(checks) > 20
    assert [check.name for check in checks if not check.passed] == []


# ---- what it refuses -------------------------------------------------------------------------


def _train_once(ops: Operations, kind: str = "mh2-shared") -> None:
    learner = learner_of(kind, ops)
    learner.step(batches_of(learner.model.config, np.random.default_rng(5)), SETTINGS)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (lambda x, y: np.add(x, y, out=y), "np.add"),
        (lambda x, y: x + y, "__add__"),
        (lambda x, y: y.__iadd__(x), "__iadd__"),
        (lambda x, y: np.sum(x), "np.sum"),
        (lambda x, y: np.asarray(x), "conversion to a NumPy array"),
        (lambda x, y: x.sum(), ".sum"),
        (lambda x, y: float(x), "__float__"),
        (lambda x, y: bool(x), "__bool__"),
        (lambda x, y: list(x), "__iter__"),
        (lambda x, y: x[np.array([0])], "an index of type ndarray"),
        (lambda x, y: y.__setitem__(0, np.zeros(24, np.float32)), "an assignment of ndarray"),
        (lambda x, y: x.T.reshape(-1), "reshape() that must copy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numpy_between_operations_is_refused_and_its_place_named(
    monkeypatch: pytest.MonkeyPatch, planted: Any, said: str
) -> None:
    """As if `block_forward` did with NumPy what it does by `ops.add_in_place`."""
    ops, strict = strict_operations()
    monkeypatch.setattr(strict, "add_in_place", planted, raising=False)
    with pytest.raises(NotOnTheDevice, match=re.escape(said)) as caught:
        _train_once(ops)
    assert re.search(r"mhmoe_np/layers/(block|moe)\.py:\d+ \((block|moe)_forward\)", str(caught.value))


def test_a_host_array_among_the_arguments_is_refused() -> None:
    ops, _ = strict_operations()
    x_ND = ops.to_device(np.ones((3, 4), np.float32))
    with pytest.raises(NotOnTheDevice, match=r"rms_norm\(\) of a host array"):
        ops.rms_norm(x_ND, np.ones(4, np.float32), eps=1e-5)


def test_an_array_is_gone_when_its_scope_ends() -> None:
    ops, _ = strict_operations()
    with ops.scope():
        x_ND = ops.to_device(np.ones((3, 4), np.float32))
        y_ND, _ = ops.rms_norm(x_ND, x_ND[0], eps=1e-5)
    with pytest.raises(NotOnTheDevice, match="after its scope ended"):
        ops.to_host(y_ND)


@pytest.mark.parametrize(
    ("operation", "argument", "said"),
    [
        ("linear", 1, "w_OI says I = 72, x_NI says I = 24; at mhmoe_np/layers/attention.py"),
        ("expert_ffn", 4, "down_EUF says E = 14, gate_up_E2FU says E = 5; at mhmoe_np/layers/moe.py"),
        ("rms_norm_backward", 0, "x_ND says N = 16, dy_ND says N = 24; at mhmoe_np/model/"),
        (
            "route_backward",
            0,
            "routing.p_ME says M = 32, dgate_MK says M = 2; at mhmoe_np/layers/moe.py",
        ),
        ("embedding_backward", 0, "id_N says N = 16, dx_ND says N = 24; at mhmoe_np/model/"),
        ("gated_activation", 0, "is not C-contiguous; at mhmoe_np/layers/feed_forward.py"),
    ],
)
def test_a_transposed_argument_is_named_with_its_letter_and_both_sizes(
    operation: str, argument: int, said: str
) -> None:
    whole: Any = strict_operations()[0]
    original = getattr(whole, operation)

    def planted(*arguments: Any, **options: Any) -> Any:
        turned = [array.T if i == argument else array for i, array in enumerate(arguments)]
        return original(*turned, **options)

    setattr(whole, operation, planted)
    with pytest.raises(BrokenPromise, match=re.escape(f"{operation}: ")) as caught:
        _train_once(whole)
    assert said in str(caught.value)


def test_a_result_of_another_shape_is_named() -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy_ref, name)

        def rms_norm(self, x_ND: Any, w_D: Any, *, eps: float) -> Any:
            y_ND, rstd_N = numpy_ref.rms_norm(x_ND, w_D, eps=eps)
            return y_ND, rstd_N[:-1]

    ops = cast(Operations, Checked(cast(Operations, Wrong())))
    with pytest.raises(BrokenPromise, match="rms_norm: rstd_N says N = 15, x_ND says N = 16"):
        _train_once(ops, "dense")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_promises_of_the_table(kind: str, backend: Any) -> None:
    """On the backends that users have, with the door closed."""
    ops = cast(Operations, Checked(load_operations(backend)))
    _all_of(kind, ops)
    if kind in QUANTISED:
        config = config_of(kind)
        weights = pack_weights(parameters_of(kind), formats_for(config)[-1], ops=ops)
        model = Model.with_weights(config, weights, ops=ops)
        forward(model, np.zeros((1, 3), np.int64), None, drop=False, ops=ops)


def test_the_strict_array_has_no_number_to_give() -> None:
    array = StrictOperations().to_device(np.zeros(3))
    assert isinstance(array, StrictArray)
    for leak in (float, bool, list, np.asarray, np.add.reduce, lambda x: x[0], lambda x: x == 0):
        with pytest.raises(NotOnTheDevice):
            leak(array)
