"""Our side on the GPU: whole models, each operation beside its floor, packed products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np

from benchmarks.floors import Call, Recorder, step_calls, total
from benchmarks.gpu_job import Job, Row, batches_of, free, parameters_of, rate
from benchmarks.protocol import OPTIMIZER
from benchmarks.sizes import GPU_SIZES, benchmark_config
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.operations.packing import FORMATS, FormatName
from mhmoe_np.operations.table import Operations, PackedWeight
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner

SETTINGS = adamw_settings(0, total_steps=1, optimizer=OPTIMIZER)
VARIANTS = (
    *(("mhmoe", "float32"), ("mhmoe", "tf32"), ("mhmoe", "tf32x3")),
    *(("mhmoe-bitnet", "float32"), ("mhmoe-bitnet", "tf32")),
)
"""Model, and how float32 products are made."""
REPEATS = 10  # of an operation in one graph
MATRICES = ((768, 768), (2048, 768), (768, 2048), (4096, 4096))  # O, I
ROWS = (1, 16, 256, 2048, 8192)


def synchronise() -> None:
    """Wait for the device."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()


# ---- whole models ----------------------------------------------------------------------------


class Ours:
    """One model of ours that trains, scores and decodes."""

    def __init__(self, job: Job, size: str, model: str, matmul: str) -> None:
        self.ops = job.operations(matmul=matmul)
        parameters = parameters_of(job, size, model)
        config = parameters.config
        self.learner = Learner(parameters, Moments.zeros(config, np.float32), updates=0, ops=self.ops)
        self.tokens = batches_of(size, config)
        self.per_step = self.tokens[0, :, 1:].size
        self._calls = 0

    def _next(self) -> np.ndarray:
        self._calls += 1
        batch: np.ndarray = self.tokens[self._calls % len(self.tokens)]
        return batch

    def train(self) -> None:
        self.learner.step([Batch.of(self._next())], SETTINGS)

    def evaluate(self) -> float:
        batch = self._next()
        sequences, window = len(batch), batch.shape[1] - 1
        stream = batch.reshape(-1)[: sequences * window + 1]
        return score_stream(
            self.learner.model, stream, window=window, batch_tokens=sequences * window, ops=self.ops
        )

    def first_loss(self) -> float:
        """Of the first batch, before any update; the update is made."""
        return self.learner.step([Batch.of(self.tokens[0])], SETTINGS).losses.nll

    def decode(self, sequences: int, decoded: int) -> Callable[[], object]:
        """What extends `sequences` sequences by a token; at the end it starts anew."""
        model, positions = self.learner.model, min(decoded, self.tokens.shape[2] - 1)
        prompt = np.ascontiguousarray(self.tokens[0].reshape(-1)[:sequences, None])
        cache = KeyValueCache(model, sequences=sequences, positions=positions, ops=self.ops)

        def step() -> None:
            if cache.length == positions:
                cache.length = 0
            with self.ops.scope():
                self.ops.to_host(cache.extend(prompt))

        return step


def whole_models(job: Job, size: str, side: str) -> Iterator[Row]:
    """Training, evaluation and decoding of each of `VARIANTS`."""
    for model, matmul in VARIANTS:
        ours = Ours(job, size, model, matmul)
        head = {"side": side, "size": size, "model": model, "matmul": matmul}
        nll = ours.first_loss()
        config = benchmark_config(size, model)
        floor = total(step_calls(config, GPU_SIZES[size].batch), matmul)
        seconds = rate(ours.train, synchronise, job.seconds)
        yield {
            **head,
            "work": "train",
            "nll": nll,
            "ms": seconds * 1e3,
            "tokens_per_s": ours.per_step / seconds,
            "floor_ms": floor * 1e3,
            "times_floor": seconds / floor,
            "device_mb": device_bytes() / 1e6,
        }
        seconds = rate(ours.evaluate, synchronise, job.seconds / 2)
        yield {
            **head,
            "work": "evaluate",
            "ms": seconds * 1e3,
            "tokens_per_s": ours.per_step / seconds,
        }
        for sequences in (1, 16):
            sequences = min(sequences, config.vocab_size)
            seconds = rate(ours.decode(sequences, job.decoded), synchronise, job.seconds / 2)
            yield {
                **head,
                "work": f"decode {sequences}",
                "ms": seconds * 1e3,
                "tokens_per_s": sequences / seconds,
            }
        del ours
        free()


def device_bytes() -> int:
    """What CuPy holds of the device's memory."""
    import cupy

    pool = getattr(cupy, "get_default_memory_pool", None)
    return int(pool().total_bytes()) if pool else 0


# ---- single operations -----------------------------------------------------------------------


def device_seconds(call: Callable[[], object], ops: Operations, repeats: int = REPEATS) -> float:
    """Seconds of a call by the device's clock, of `repeats` in a row.

    They are recorded as a graph, so that the host's launches cost nothing; where that is refused they
    are launched one after another. What fits the device's cache is found there.
    """
    import cupy

    stream = cupy.cuda.get_current_stream()

    def in_a_row() -> None:
        for _ in range(repeats):
            with ops.scope():
                call()

    play = in_a_row
    with ops.scope():
        call()  # compiled, and memory asked for
    stream.synchronize()
    try:
        stream.begin_capture()
        try:
            in_a_row()
        finally:
            graph = stream.end_capture()
        play = lambda: graph.launch(stream)  # noqa: E731
    except Exception as error:  # Whatever refuses: CUDA, cuBLAS, CuPy.
        print(f"  not recorded: {error}", flush=True)
    play()
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    first.record(stream)
    play()
    last.record(stream)
    last.synchronize()
    return max(float(cupy.cuda.get_elapsed_time(first, last)) / 1e3 / repeats, 1e-9)


class Stopwatch:
    """Operations that, at the first call of each kind, are called again and timed.

    Attributes:
        seconds: of each kind of call.
        calls: all of them, in order.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops, self._recorder = ops, Recorder(ops)
        self.seconds: dict[Call, float] = {}

    @property
    def calls(self) -> list[Call]:
        return self._recorder.calls

    def __getattr__(self, name: str) -> Any:
        recorded, plain = getattr(self._recorder, name), getattr(self._ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            before = len(self.calls)
            result = recorded(*arguments, **options)
            if len(self.calls) > before and self.calls[-1] not in self.seconds:
                self.seconds[self.calls[-1]] = device_seconds(
                    lambda: plain(*arguments, **options), self._ops
                )
            return result

        return call if callable(plain) else plain


def single_operations(
    job: Job, size: str, model: str = "mhmoe", matmul: str = "float32"
) -> Iterator[Row]:
    """Each operation of a training step: its time, and what it reaches of its floor."""
    ops = job.operations(matmul=matmul)
    watch = Stopwatch(ops)
    parameters = parameters_of(job, size, model)
    config = parameters.config
    learner = Learner(
        parameters, Moments.zeros(config, np.float32), updates=0, ops=cast(Operations, watch)
    )
    watch.calls.clear()
    learner.add_gradient([Batch.of(batches_of(size, config)[0])])
    learner.update(SETTINGS)
    head = {"size": size, "model": model, "matmul": matmul}
    for call, count in Counter(watch.calls).items():
        floor, seconds = call.floor, watch.seconds[call]
        memory, arithmetic = floor.memory_seconds(), floor.arithmetic_seconds(matmul)
        yield {
            **head,
            "operation": call.operation,
            "call": str(call),
            "calls": count,
            "us": seconds * 1e6,
            "floor_us": max(memory, arithmetic) * 1e6,
            "times_floor": seconds / max(memory, arithmetic),
            "bound": "memory" if memory > arithmetic else "arithmetic",
            "intensity": floor.intensity,
            "mb": floor.bytes / 1e6,
            "gb_per_s": floor.bytes / seconds / 1e9,
            "tflop_per_s": floor.flops / seconds / 1e12,
        }
    yield {
        **head,
        "operation": "sum of a step",
        "calls": len(watch.calls),
        "us": sum(watch.seconds[call] for call in watch.calls) * 1e6,
        "floor_us": total(watch.calls, matmul) * 1e6,
    }


# ---- packed products -------------------------------------------------------------------------


def packed_weight(
    ops: Operations, rng: np.random.Generator, outputs: int, inputs: int, format: FormatName
) -> PackedWeight:
    """Random integers of a format, with scales of 1."""
    _, _, base, lowest, step = FORMATS[format]
    q_EOI = (lowest + step * rng.integers(0, base, (1, outputs, inputs))).astype(np.float32)
    packed = ops.empty_packed(1, outputs, inputs, format)
    ops.pack_in_place(ops.to_device(q_EOI), packed)
    return PackedWeight(packed, ops.to_device(np.ones((1, outputs), np.float32)))


def packed_products(
    job: Job, matrices: tuple[tuple[int, int], ...] = MATRICES, rows: tuple[int, ...] = ROWS
) -> Iterator[Row]:
    """A packed linear map, quantisation of its rows included, beside our own in float32."""
    rng = np.random.default_rng(0)
    for matmul in ("float32", "tf32"):
        ops = job.operations(matmul=matmul)
        for outputs, inputs in matrices:
            weights: dict[str, Any] = {
                matmul: ops.to_device(rng.standard_normal((outputs, inputs), np.float32))
            }
            if matmul == "float32":
                weights |= {
                    format: packed_weight(ops, rng, outputs, inputs, format) for format in FORMATS
                }
            for N in rows:
                x_NI = ops.to_device(rng.standard_normal((N, inputs), np.float32))
                for name, weight in weights.items():
                    seconds = device_seconds(partial(ops.linear, x_NI, weight, None), ops)
                    yield {
                        "side": "ours",
                        "rows": N,
                        "outputs": outputs,
                        "inputs": inputs,
                        "kind": name,
                        "us": seconds * 1e6,
                        "tops": 2 * N * outputs * inputs / seconds / 1e12,
                    }
