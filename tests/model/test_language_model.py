"""Promises of the whole model: accumulation, decoding, independence of threads and buffers."""

from __future__ import annotations

import numpy as np
import pytest

from mhmoe_np.audit.models import KINDS, QUANTISED, parameters
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.loss import Batch, DeviceBatch, loss, loss_and_gradient
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName, Operations


def _model(kind: str, ops: Operations, dtype: type = np.float64) -> Model:
    return Model.of(parameters(kind, dtype), ops=ops)


def _batch(rows: int) -> Batch:
    tokens = np.random.default_rng(4).integers(0, 37, (rows, 13))
    target_BT = tokens[:, 1:].copy()
    target_BT[0, 5:] = -100
    return Batch(np.ascontiguousarray(tokens[:, :-1]), target_BT)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", ["dense", "smoe", "mh2-topk-balance", "mh3", "mh2-z-loss"])
def test_accumulated_micro_batches_equal_the_big_batch(kind: str, backend: BackendName) -> None:
    # [D5], [spec 4 NLL], [spec 4 aux]
    ops = load_operations(backend)
    model, batch = _model(kind, ops), _batch(4)
    big, small = (Parameters(model.config, np.float64) for _ in range(2))
    parts = [Batch(batch.input_BT[i : i + 1], batch.target_BT[i : i + 1]) for i in range(4)]
    whole = loss_and_gradient(model, big, [batch], ops=ops)
    accumulated = loss_and_gradient(model, small, parts, ops=ops)
    # float64, sums in another order
    np.testing.assert_allclose(accumulated.losses, whole.losses, rtol=1e-13)
    scale = np.abs(big.flat_P).max()
    np.testing.assert_allclose(small.flat_P, big.flat_P, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "capacity" not in kind])
def test_cached_decoding_gives_the_uncached_logits(kind: str, backend: BackendName) -> None:
    # [spec 2 logits], [D4]
    ops = load_operations(backend)
    # Where float32's last bits differ, a quantiser may round to the other neighbour: hence float64.
    model = _model(kind, ops, np.float64 if kind in QUANTISED else np.float32)
    id_BT = np.random.default_rng(5).integers(0, 37, (2, 11))
    x_ND, _ = forward(model, id_BT, None, drop=False, ops=ops)
    logits_BTV = (x_ND @ model.weights.output_VD.T).reshape(2, 11, -1)
    cache = KeyValueCache(model, sequences=2, positions=11, ops=ops)
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10), (10, 11)):
        logits_BV = cache.extend(id_BT[:, first:last])
        expected_BV = logits_BTV[:, last - 1]
        assert np.abs(logits_BV - expected_BV).max() <= 1e-5 * np.abs(expected_BV).max()


@pytest.mark.parametrize("kind", ["mh2-shared", "mh2-ternary-shared-capacity", "mh3-sign"])
def test_same_bits_at_any_number_of_threads_and_with_reused_buffers(kind: str) -> None:
    batch = _batch(40)
    results = []
    for threads, keep in ((1, False), (2, False), (2, True), (1, True)):
        ops = load_operations("numba", threads=threads, keep_buffers=keep)
        model = _model(kind, ops, np.float32)
        for _ in range(2):
            gradient = Parameters(model.config, np.float32)
            loss_and_gradient(model, gradient, [batch], ops=ops)
            results.append(gradient.flat_P.tobytes())
    load_operations("numba", threads=2)
    assert len(set(results)) == 1


def test_a_later_token_leaves_earlier_logits_as_they_are() -> None:
    ops = load_operations("numpy")
    model = _model("mh3-shared-sub-norm", ops)
    id_BT = np.random.default_rng(6).integers(0, 37, (1, 9))
    changed_BT = id_BT.copy()
    changed_BT[0, 6] += 1 if changed_BT[0, 6] < 36 else -1
    before, _ = forward(model, id_BT, None, drop=False, ops=ops)
    after, _ = forward(model, changed_BT, None, drop=False, ops=ops)
    # Rows sorted by expert change places, so a product may round differently.
    np.testing.assert_allclose(after[:6], before[:6], rtol=1e-12, atol=1e-14)
    assert np.abs(after[6:] - before[6:]).max() > 1e-3


@pytest.mark.parametrize("length", [2, 9, 33, 34, 200])
def test_a_score_does_not_depend_on_how_many_windows_go_at_once(length: int) -> None:
    # [D4]
    ops = load_operations("numpy")
    model = _model("mh2-capacity", ops)
    token_W = np.random.default_rng(7).integers(0, 37, length)
    one = score_stream(model, token_W, window=32, batch_tokens=1, ops=ops)
    many = score_stream(model, token_W, window=32, batch_tokens=1000, ops=ops)
    assert one == pytest.approx(many, rel=1e-13)
    # By hand: windows of 32 inputs, every token after the first scored once.
    total = 0.0
    for start in range(0, length - 1, 32):
        window = token_W[start : start + 33]
        x_ND, _ = forward(model, window[None, :-1], None, drop=False, ops=ops)
        total += ops.token_nll(x_ND, model.weights.output_VD, window[1:]).sum()
    assert one == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("target", [37, -1])
def test_a_target_is_of_the_vocabulary_or_padding(target: int) -> None:
    ops = load_operations("numpy")
    model, ids = _model("dense", ops), np.array([[1, 2]])
    loss(model, [Batch(ids, np.array([[36, -100]]))], ops=ops)
    with pytest.raises(ValueError, match=r"0 \.\. 36"):
        loss(model, [Batch(ids, np.array([[36, target]]))], ops=ops)


def test_ids_outside_the_vocabulary_and_too_many_positions_are_refused() -> None:
    ops = load_operations("numpy")
    model = _model("dense", ops)
    for ids, said in ((np.array([[1, 37]]), r"0 \.\. 36"), (np.zeros((1, 33), int), "max_position")):
        cache = KeyValueCache(model, sequences=1, positions=32, ops=ops)
        for refusing in (
            lambda ids=ids: loss(model, [Batch(ids, np.zeros_like(ids))], ops=ops),
            lambda ids=ids: DeviceBatch.of(Batch(ids, np.zeros_like(ids)), model.config, ops=ops),
            lambda ids=ids: score_stream(
                model, np.append(ids, 1), window=ids.shape[1], batch_tokens=64, ops=ops
            ),
        ):
            with pytest.raises(ValueError, match=said):
                refusing()
        with pytest.raises(ValueError, match=said if ids.shape[1] < 32 else "do not fit"):
            cache.extend(ids)
