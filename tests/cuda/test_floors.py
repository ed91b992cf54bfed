"""The floors of a step's operations, and that the backend's kernels together stay near them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import kernel_costs
from benchmarks.floors import FLOORS, Call, Recorder, ShapesOnly, Work, step_calls, total
from benchmarks.kernel_costs import LAUNCHES, base_name, launches_of, total_of_kernels
from benchmarks.sizes import GPU_SIZES, benchmark_config
from mhmoe_np.costs.model import macs_per_token
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.door import Door, Promise, promises
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.run import OptimizerConfig
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import has_gpu
from tests.cuda.emulator.cupy_on_cpu import emulation

# What a step costs when every kernel is as fast as its bound, over what its operations must cost: more
# for products that attention makes twice, and for arrays that one kernel leaves for the next.
MOST = 1.3
SEQUENCES = 2


def small(size: str) -> ModelConfig:
    """A model with the layers of a benchmark's, in the same order, and small ones."""
    settings = benchmark_config(size, "mhmoe").model_dump()
    settings |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 12, "max_position_embeddings": 6}
    settings |= {"vocab_size": 31, "num_experts": 5, "moe_intermediate_size": 10}
    return ModelConfig.model_validate(settings)


def step_on(ops: Operations, config: ModelConfig, forget: Any) -> None:
    """One training step; `forget` is called before it."""
    parameters = Parameters(config, np.float32)
    initialise(parameters, 0)
    learner = Learner(parameters, Moments.zeros(config, np.float32), updates=0, ops=ops)
    shape = SEQUENCES, config.max_position_embeddings + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    forget()
    learner.add_gradient([Batch.of(tokens)])
    learner.update(adamw_settings(0, total_steps=1, optimizer=OptimizerConfig()))


def test_every_operation_has_a_floor() -> None:
    assert FLOORS.keys() == promises().keys()


@pytest.mark.parametrize("size", ["B", "paper"])
def test_arrays_without_numbers_make_the_calls_of_real_ones(size: str) -> None:
    config = small(size)
    recorder = Recorder(load_operations("numpy"))
    step_on(cast(Operations, recorder), config, recorder.calls.clear)
    assert step_calls(config, SEQUENCES) == recorder.calls


@pytest.mark.parametrize("size", GPU_SIZES)
def test_the_products_of_a_step_are_those_that_costs_counts(size: str) -> None:
    config, sequences = benchmark_config(size, "mhmoe"), GPU_SIZES[size].batch
    calls = step_calls(config, sequences)
    window = config.max_position_embeddings
    macs = macs_per_token(config, window)
    attention = macs.pop("attention")
    products = {call.operation.startswith("attention"): 0.0 for call in calls}
    for call in calls:
        products[call.operation.startswith("attention")] += call.floor.products
    tokens = sequences * window
    assert products[False] == pytest.approx(6 * tokens * sum(macs.values()), rel=0.01)
    # Half of a causal window; the backward is five products for the forward's two.
    assert products[True] == pytest.approx(7 * tokens * attention, rel=0.01)


class _Counting(Door):
    """The operations of the emulated backend, and the launches of each call."""

    def __init__(self, ops: Operations) -> None:
        super().__init__(ops)
        self.found: list[tuple[Call, Counter[str]]] = []

    def visit(self, operation: str, promise: Promise) -> _Counted:
        return _Counted(self, operation, promise)


class _Counted:
    def __init__(self, door: _Counting, operation: str, promise: Promise) -> None:
        self._door, self._recorder = door, Recorder(cast(Operations, ShapesOnly()))
        self._noted = self._recorder.visit(operation, promise)

    def enter(self, arguments: Mapping[str, Any]) -> None:
        self._noted.enter(arguments)
        self._before = Counter(emulation.launches)

    def leave(self, results: Sequence[Any]) -> None:
        self._noted.leave(results)
        launched = emulation.launches - self._before
        del launched["copy"]  # the first product opens cuBLAS, whose workspace is zeroed
        self._door.found.append((self._recorder.calls[0], launched))


@pytest.mark.skipif(has_gpu(), reason="counted by the emulator")
@pytest.mark.parametrize("size", ["B", "paper"])
def test_a_step_launches_the_kernels_whose_costs_are_stated(size: str) -> None:
    door = _Counting(cuda_operations())
    step_on(cast(Operations, door), small(size), door.found.clear)
    assert len(door.found) > 40
    for call, launched in door.found:
        names: Counter[str] = Counter()
        for kernel, times in launched.items():
            names[base_name(kernel)] += times
        assert names == Counter(launch.kernel for launch in launches_of(call)), call


@pytest.mark.parametrize("size", GPU_SIZES)
def test_the_kernels_of_a_step_come_near_its_floor(size: str) -> None:
    calls = step_calls(benchmark_config(size, "mhmoe"), GPU_SIZES[size].batch)
    assert {call.operation for call in calls} <= LAUNCHES.keys()
    ratio = total_of_kernels(calls) / total(calls)
    print(f"size {size}: all kernels take {ratio:.3f} times the floor in float32")
    assert 1 <= ratio <= MOST
    # No kernel moves less than its operation must: rows once read twice, or an array forgotten.
    for call in calls:
        kernels = sum((launch.work for launch in launches_of(call)), Work())
        products = kernels.products + kernels.elementwise
        assert products >= 0.99 * call.floor.products, call


def test_the_backends_own_numbers_are_meant() -> None:
    cuda_operations()
    from mhmoe_np.operations.cuda import dispatch, loss, norm, optimiser, router

    assert kernel_costs.SEGMENT == dispatch.SEGMENT
    assert (kernel_costs.CHUNK_BYTES, kernel_costs.CHUNK_ROWS) == (loss.CHUNK_BYTES, loss.CHUNK_ROWS)
    assert kernel_costs.NORM_ROWS == norm.ROWS
    assert kernel_costs.SQUARES == optimiser.CHUNK
    assert kernel_costs.STRIP == router.STRIP
