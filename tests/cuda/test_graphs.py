"""What a step costs the host, by the stand-in's counters, and what is recorded of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from tests.cuda.backend import cuda_operations, emulated_only, on_the_device
from tests.cuda.emulator.cupy_on_cpu import emulation
from tests.whole_models import SETTINGS, batches_of, learner_of, parameters_of

KINDS = ["mh2-capacity", "mh3-sign", "dense"]

pytestmark = on_the_device


@emulated_only
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_copy_up_one_graph_and_one_wait(kind: str, parts: int) -> None:
    learner = learner_of(kind, cuda_operations(keep_buffers=True))
    config, rng = learner.model.config, np.random.default_rng(0)
    for step in range(4):
        emulation.clear()
        assert learner.step(batches_of(config, rng)[:parts], SETTINGS).is_finite
        assert (emulation.uploads, emulation.waits) == (1, 1)
        assert emulation.graphs_played == (step > 0)
        assert bool(emulation.launches) == (step == 0)


@emulated_only
@pytest.mark.parametrize("kind", ["mh2-shared", "mh2-capacity", "mh3-sign"])
def test_no_launch_count_grows_with_the_experts(kind: str) -> None:
    """Which kernels they are may depend on how many rows an expert has, how many does not."""
    found: list[list[int]] = []
    for experts in (4, 40):
        ops = cuda_operations(keep_buffers=True)
        learner = learner_of(kind, ops, num_experts=experts)
        rng = np.random.default_rng(0)
        emulation.clear()
        learner.step(batches_of(learner.model.config, rng), SETTINGS)
        counted = [emulation.launches.total()]
        emulation.clear()
        stream = rng.integers(0, learner.model.config.vocab_size, 60)
        score_stream(learner.model, stream, window=16, batch_tokens=32, ops=ops)
        counted.append(emulation.launches.total())
        cache = KeyValueCache(learner.model, sequences=1, positions=16, ops=ops)
        emulation.clear()
        with ops.scope():
            cache.extend(stream[None, :5])
        counted.append(emulation.launches.total())
        found.append(counted)
    assert found[0] == found[1]


@emulated_only
def test_a_score_is_one_copy_up_and_one_wait() -> None:
    ops = cuda_operations(keep_buffers=True)
    model = Model.of(parameters_of("mh2-shared").to_device(ops), ops=ops)
    stream = np.random.default_rng(1).integers(0, model.config.vocab_size, 150)
    emulation.clear()
    score_stream(model, stream, window=16, batch_tokens=32, ops=ops)
    assert (emulation.uploads, emulation.waits) == (1, 1)


@emulated_only
@pytest.mark.parametrize("kind", ["mh2-shared", "mh2-ternary"])
def test_a_token_is_one_copy_up_one_graph_and_one_wait(kind: str) -> None:
    ops = cuda_operations(keep_buffers=True)
    model = Model.of(parameters_of(kind).to_device(ops), ops=ops)
    cache = KeyValueCache(model, sequences=1, positions=16, ops=ops)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (1, 12))
    for t in range(12):
        emulation.clear()
        with ops.scope():
            ops.to_host(cache.extend(ids[:, t : t + 1]))
        assert (emulation.uploads, emulation.waits) == (1, 1)
        assert emulation.graphs_played == (t > 0)
        assert bool(emulation.launches) == (t == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_has_the_bits_of_one_made_anew(kind: str) -> None:
    states = []
    for keep_buffers in (True, False):
        ops = cuda_operations(keep_buffers=keep_buffers)
        learner, rng = learner_of(kind, ops), np.random.default_rng(3)
        for step in range(4):
            result = learner.step(
                batches_of(learner.model.config, rng), SETTINGS._replace(learning_rate=1e-3 * step)
            )
            assert result.is_finite
        groups = learner.parameters, *learner.moments
        states.append([group.to_host(ops).flat_P.tobytes() for group in groups])
        states[-1].append(str(result))
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_decoding_has_the_bits_of_one_made_anew(kind: str) -> None:
    logits: list[list[bytes]] = [[], []]
    for keep_buffers, found in zip((True, False), logits, strict=True):
        ops = cuda_operations(keep_buffers=keep_buffers)
        model = Model.of(parameters_of(kind).to_device(ops), ops=ops)
        cache = KeyValueCache(model, sequences=2, positions=16, ops=ops)
        ids = np.random.default_rng(4).integers(0, model.config.vocab_size, (2, 14))
        for first, last in ((0, 5), *((t, t + 1) for t in range(5, 14))):
            with ops.scope():
                found.append(ops.to_host(cache.extend(ids[:, first:last])).tobytes())
    assert logits[0] == logits[1]


def test_while_memory_is_handed_out_nothing_is_played() -> None:
    """What was recorded would overwrite it."""
    ops = cuda_operations(keep_buffers=True)

    def add(fixed: None, x_ND: Any) -> Any:
        y_ND = ops.empty(x_ND.shape, x_ND.dtype)
        y_ND[...] = x_ND
        ops.add_in_place(x_ND, y_ND)
        return y_ND

    doubled, x_ND = ops.repeated(add), np.ones((3, 4), np.float32)
    for _ in range(3):
        with ops.scope():
            assert (ops.to_host(doubled(None, x_ND)) == 2).all()
    with ops.scope():
        mine = ops.empty((3, 4), np.float32)
        mine[...] = 7
        assert (ops.to_host(doubled(None, 2 * x_ND)) == 4).all()
        assert (ops.to_host(mine) == 7).all()


def test_a_backend_records_what_it_does_itself_after_another_was_made() -> None:
    """Both use the one stream: a second one would be current while the first's records nothing."""
    first, _ = cuda_operations(keep_buffers=True), cuda_operations(keep_buffers=True)

    def copy(fixed: None, x_N: Any) -> Any:
        y_N = first.empty(x_N.shape, x_N.dtype)
        y_N[...] = 0
        first.add_in_place(x_N, y_N)
        return y_N

    copied = first.repeated(copy)
    for number in range(4):
        with first.scope():
            assert (first.to_host(copied(None, np.full(3, number, np.float32))) == number).all()


def test_other_shapes_and_other_fixed_numbers_are_other_work() -> None:
    ops = cuda_operations(keep_buffers=True)
    seen = []

    def note(fixed: int, x_ND: Any) -> Any:
        seen.append((fixed, x_ND.shape))
        y_ND = ops.empty(x_ND.shape, x_ND.dtype)
        y_ND[...] = fixed
        return y_ND

    work = ops.repeated(note)
    for _ in range(4):
        for fixed, rows in ((1, 2), (5, 2), (1, 3)):
            with ops.scope():
                y_ND = ops.to_host(work(fixed, np.zeros((rows, 2))))
                assert (y_ND == fixed).all()
                assert y_ND.shape == (rows, 2)
    assert sorted(seen) == sorted(2 * [(1, (2, 2)), (5, (2, 2)), (1, (3, 2))])


@emulated_only
def test_a_failure_while_recording_ends_the_recording() -> None:
    ops = cuda_operations(keep_buffers=True)
    calls = []

    def fail_when_recorded(fixed: None, x_N: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return x_N

    work = ops.repeated(fail_when_recorded)
    with ops.scope():
        work(None, np.ones(3))
    with ops.scope(), pytest.raises(RuntimeError, match="planted"):
        work(None, np.ones(3))
    with ops.scope():
        assert (ops.to_host(work(None, np.ones(3))) == 1).all()
