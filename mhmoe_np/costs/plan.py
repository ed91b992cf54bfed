"""What a training run will take: parameters, FLOPs, memory, time and disk, before it starts.

Sizes follow from the configuration. The rest is a short probe of this machine: a few steps of the real
model on two small micro-batches; how time and buffers grow from one to the other tells the run's own.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import psutil

from mhmoe_np.costs.model import ParameterCount, macs_per_token, parameter_count
from mhmoe_np.inference.evaluate import BATCH_TOKENS, score_stream
from mhmoe_np.model.loss import Batch, DeviceBatch, add_router_statistics
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.room import check_batch_room, check_room
from mhmoe_np.model.sums import StepSums
from mhmoe_np.model.weights import Weights
from mhmoe_np.operations.table import AdamWSettings, BitWeight, Blas, Device, Operations
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.run import RunConfig
from mhmoe_np.training.step import Learner

# What preparing the text leaves behind in the process, as measured: the tokenizer's library, and its
# encodings of what is tokenised at a time.
PREPARATION_BYTES, PREPARATION_BYTES_PER_BYTE = 65_000_000, 11
BYTES_PER_TOKEN = 3.0  # of text, about; a stored token takes two bytes
PROBE_TOKENS = 2048  # at least, of the smaller probe
REPEATS = 2  # the faster counts


class Memory(NamedTuple):
    """Bytes of each part at the peak of training."""

    program: int  # interpreter, libraries, kernels, prepared text; on a device what others use
    parameters: int
    gradient: int
    moments: int
    quantised: int  # BitNet's integers, as floats and packed
    activations: int  # what the backward needs, and scratch

    @property
    def peak(self) -> int:
        """All together."""
        return sum(self)


class Plan(NamedTuple):
    """The forecast."""

    parameters: ParameterCount
    flops_per_token: dict[str, int]  # of training, by part: 6 times the multiply-adds of a forward
    memory: Memory
    device: Device | None  # whose memory it is; None: the host's
    blas: Blas | None  # the library of the products; None: a device's
    tokens_per_s: float
    step_seconds: float
    training_seconds: float  # all steps, without preparation, checkpoints and evaluation
    disk: int  # bytes of the finished run folder's checkpoints, and of one being written


class _Probe(NamedTuple):
    """What the steps on one micro-batch took."""

    seconds: float  # of loss and gradient
    routing_seconds: float  # of a forward pass alone
    update_seconds: float
    buffers: int  # bytes


def make_plan(
    config: RunConfig,
    text_bytes: int,
    *,
    load: Callable[[], Operations],
    on_progress: OnProgress = unseen,
) -> Plan:
    """Probe this machine and add up, for a run on a text of `text_bytes`.

    load: makes the operations of a run; each probe has its own, since their buffers adapt to its size.
    on_progress: counts sequences that a probe took through the model.

    Raises   UserError: the model alone, or a probe of it, does not fit into the memory that is free.
    Source   [spec 7 multiply-adds]; accumulated steps [D5]; the rest is measured here
    """
    training = config.training
    count = parameter_count(config.model)
    check_room(config.model, copies=4, source="model")
    sequences = training.batch_size // training.gradient_accumulation_steps
    smaller = min(sequences, math.ceil(PROBE_TOKENS / training.sequence_length))
    larger = min(sequences, 2 * smaller)
    check_batch_room(
        config.model,
        tokens=larger * training.sequence_length,
        source=f"training.sequence_length: {training.sequence_length}",
    )
    total = (1 + REPEATS) * (larger + (smaller if smaller < larger else 0))
    counted = counting(on_progress, "probing this machine", total)
    counted(0)
    parameters = Parameters(config.model, np.float32)
    initialise(parameters, training.seed)
    moments = Moments.zeros(config.model, np.float32)
    probes = []
    if smaller < larger:
        probes.append(_probe_alone(smaller, parameters, moments, config, load, counted))
        gc.collect()  # its learner, which refers to itself
    ops = load()
    learner = Learner(parameters, moments, updates=0, ops=ops)
    probes.append(_probe(learner, larger, config, ops, counted))
    whole = _extrapolated(probes, smaller, larger, sequences)
    _score(learner, config, ops)  # a run ends with it

    arrays = parameters.flat_P.nbytes
    quantised = _quantised_bytes(learner.model.weights)
    device, ours = ops.device(), 4 * arrays + quantised + ops.buffer_bytes()
    if device is None:
        program = _resident() - ours + PREPARATION_BYTES + PREPARATION_BYTES_PER_BYTE * text_bytes
    else:
        program = max(0, device.total_bytes - device.free_bytes - ours)
    buffers = max(whole.buffers, ops.buffer_bytes())
    memory = Memory(program, arrays, arrays, 2 * arrays, quantised, buffers)
    seconds = whole.update_seconds + training.gradient_accumulation_steps * whole.seconds
    if training.gradient_accumulation_steps > 1 and config.model.num_experts:
        seconds += training.gradient_accumulation_steps * whole.routing_seconds  # [D5]
    macs = macs_per_token(config.model, training.sequence_length)
    return Plan(
        parameters=count,
        flops_per_token={part: 6 * number for part, number in macs.items()},
        memory=memory,
        device=device,
        blas=ops.blas(),
        tokens_per_s=training.batch_size * training.sequence_length / seconds,
        step_seconds=seconds,
        training_seconds=training.steps * seconds,
        disk=((training.keep_checkpoints + 1) * 3 + (2 if training.eval_every else 0)) * arrays
        + int(2 * text_bytes / BYTES_PER_TOKEN),
    )


def _tokens(config: RunConfig, sequences: int) -> np.ndarray:
    rng = np.random.default_rng(config.training.seed)
    shape = sequences, config.training.sequence_length + 1
    return rng.integers(0, config.model.vocab_size, shape)


def _probe(
    learner: Learner,
    sequences: int,
    config: RunConfig,
    ops: Operations,
    counted: Callable[[int], None],
) -> _Probe:
    """Steps that change nothing: with learning rate and decay 0."""
    batch = Batch.of(_tokens(config, sequences))
    still = AdamWSettings(0.0, 0.9, 0.95, 1e-6, 0.0, 1.0)
    sums, placed = StepSums(config.model, ops=ops), DeviceBatch.of(batch, config.model, ops=ops)
    steps, updates, routings = [], [], []
    for _ in range(1 + REPEATS):  # the first one warms up
        start = time.perf_counter()
        learner.step([batch], still)
        stepped = time.perf_counter()
        learner.update(still)
        learner.read()  # waits for a device
        updated = time.perf_counter()
        add_router_statistics(learner.model, [placed], sums, ops=ops)
        sums.read(1, np.float32)
        steps.append(stepped - start)
        updates.append(updated - stepped)
        routings.append(time.perf_counter() - updated)
        counted(sequences)
    update = min(updates)
    return _Probe(max(0.0, min(steps) - update), min(routings), update, ops.buffer_bytes())


def _probe_alone(
    sequences: int,
    parameters: Parameters,
    moments: Moments,
    config: RunConfig,
    load: Callable[[], Operations],
    counted: Callable[[int], None],
) -> _Probe:
    """A probe whose memory is given back."""
    ops = load()
    return _probe(Learner(parameters, moments, updates=0, ops=ops), sequences, config, ops, counted)


def _extrapolated(probes: list[_Probe], smaller: int, larger: int, sequences: int) -> _Probe:
    """The probe of a micro-batch of `sequences`: beyond the larger one, a straight line."""
    last = probes[-1]
    if sequences <= larger:
        return last
    first, times = probes[0], (sequences - larger) / (larger - smaller)
    return _Probe(
        last.seconds + times * (last.seconds - first.seconds),
        last.routing_seconds + times * (last.routing_seconds - first.routing_seconds),
        last.update_seconds,
        last.buffers + round(times * (last.buffers - first.buffers)),
    )


def _score(learner: Learner, config: RunConfig, ops: Operations) -> None:
    window = config.model.max_position_embeddings
    windows = max(1, BATCH_TOKENS // window)
    stream = np.random.default_rng(0).integers(0, config.model.vocab_size, windows * window + 1)
    score_stream(learner.model, stream, window=window, batch_tokens=len(stream), ops=ops)


def _quantised_bytes(weights: Weights) -> int:
    total = 0
    for weight in weights.arrays.values():
        if isinstance(weight, BitWeight):
            total += weight.w.nbytes + weight.beta.nbytes
            total += weight.packed.code.nbytes if weight.packed is not None else 0
    return total


def _resident() -> int:
    """Bytes of this process in memory."""
    resident: int = psutil.Process().memory_info().rss
    return resident
