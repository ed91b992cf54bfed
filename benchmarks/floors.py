"""What each operation of a step must at least cost on a GPU: arithmetic, bytes moved, time.

    python -m benchmarks.floors [--size A|B|paper] [--model mhmoe] [--matmul float32|tf32|tf32x3]

The calls are those of the trainer itself, run on arrays that have a shape and no numbers. A floor
counts what the table's sections Cost count: each operand read once and each result written once, no
matter of which kernels an operation is made. Time is the longer of its bytes' and its arithmetic's.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import DTypeLike

from benchmarks.sizes import GPU_SIZES, MODELS, benchmark_config
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.door import Door, Promise, arrays_in, axes_of, promises
from mhmoe_np.operations.packing import FormatName, PackedMatrices, code_shape
from mhmoe_np.operations.table import (
    BitWeight,
    Dispatch,
    ExpertCache,
    Operations,
    PackedWeight,
    Routing,
)
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.run import OptimizerConfig
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner

# Of an H100 (SXM): bytes a second that copies reach, and the products' dense rates. The float32 rate is
# the peak without tensor cores, the others what float16 products reached of their peak, on theirs.
BANDWIDTH = 3.0e12
RATES = {"float32": 66.9e12, "tf32": 399e12, "tf32x3": 133e12, "int8": 1600e12}

Sizes = Mapping[str, int]
"""What each letter of `types.DIMENSIONS` is in one call, and what `sizes_of` adds."""


class Work(NamedTuple):
    """What one or several calls do."""

    bytes: float = 0  # read and written
    products: float = 0  # FLOPs of matrix products in float32
    elementwise: float = 0  # FLOPs of all else
    integer: float = 0  # operations of 8-bit products

    def __add__(self, other: Any) -> Work:
        """Both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> Work:
        """So often."""
        return Work(*(times * part for part in self))

    @property
    def flops(self) -> float:
        """All of its arithmetic."""
        return self.products + self.elementwise + self.integer

    def seconds(self, matmul: str = "float32") -> float:
        """The longer of memory and arithmetic."""
        return max(self.memory_seconds(), self.arithmetic_seconds(matmul))

    def memory_seconds(self) -> float:
        return self.bytes / BANDWIDTH

    def arithmetic_seconds(self, matmul: str = "float32") -> float:
        return (
            self.products / RATES[matmul]
            + self.elementwise / RATES["float32"]
            + self.integer / RATES["int8"]
        )

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes if self.bytes else math.inf


# ---- the floor of each operation -------------------------------------------------------------


def _product(s: Sizes, numbers: float, macs: float) -> Work:
    """A forward's product: of integers where the weight is quantised."""
    if s["integer"]:
        # Packed weights of a ternary model take two bits each.
        return Work(s["bytes"] * numbers + s["weights"] / 4, integer=2 * macs)
    return Work(s["bytes"] * (numbers + s["weights"]), products=2 * macs)


def _linear(s: Sizes) -> Work:
    N, I, O = s["N"], s["I"], s["O"]
    return _product(s, N * I + N * O, N * I * O)


def _linear_backward(s: Sizes) -> Work:
    N, I, O = s["N"], s["I"], s["O"]
    numbers = 2 * N * O + (3 if s["onto"] else 2) * N * I + 3 * O * I
    return Work(s["bytes"] * numbers, products=4 * N * I * O)


def _expert_ffn(s: Sizes) -> Work:
    R, U, F, M = s["R"], s["U"], s["F"], s["M"]
    return _product(s, 2 * R * U + 5 * R * F + M * U, 3 * R * U * F) + Work(elementwise=2 * R * U)


def _expert_ffn_backward(s: Sizes) -> Work:
    R, U, F, E = s["R"], s["U"], s["F"], s["E"]
    numbers = 9 * E * U * F + 4 * R * U + 10 * R * F
    return Work(s["bytes"] * numbers, products=12 * R * U * F, elementwise=4 * R * F)


def _seen(s: Sizes) -> float:
    """Pairs of a query and a key that it sees: the T queries are the last of S positions."""
    S, T = s.get("S", s["T"]), s["T"]
    return T * (S - T) + T * (T + 1) / 2


def _attention(s: Sizes) -> Work:
    B, T, A, G, C, S = *(s[letter] for letter in "BTAGC"), s.get("S", s["T"])
    numbers = B * C * (2 * T * A + 2 * S * G) + B * A * T
    return Work(s["bytes"] * numbers, products=4 * B * A * C * _seen(s))


def _attention_backward(s: Sizes) -> Work:
    B, T, A, G, C = (s[letter] for letter in "BTAGC")
    numbers = B * T * C * (4 * A + 4 * G) + B * A * T
    return Work(s["bytes"] * numbers, products=10 * B * A * C * _seen(s))


def _attention_with_cache(s: Sizes) -> Work:
    """As if the cache were full."""
    B, T, A, G, C, Y = (s[letter] for letter in "BTAGCY")
    numbers = B * C * (2 * T * A + 4 * T * G + 2 * Y * G)
    return Work(s["bytes"] * numbers, products=4 * B * A * C * T * Y)


def _elementwise(
    numbers: Callable[[Sizes], float], flops: Callable[[Sizes], float]
) -> Callable[[Sizes], Work]:
    return lambda s: Work(s["bytes"] * numbers(s), elementwise=flops(s))


INDEX = 8  # bytes of an int64
FLOORS: dict[str, Callable[[Sizes], Work]] = {
    "add_in_place": _elementwise(lambda s: 3 * s["N"] * s["D"], lambda s: s["N"] * s["D"]),
    "add_sum": _elementwise(lambda s: s["N"], lambda s: s["N"]),
    "linear": _linear,
    "linear_backward": _linear_backward,
    "embedding": lambda s: Work(s["bytes"] * 2 * s["N"] * s["D"] + INDEX * s["N"]),
    "embedding_backward": lambda s: Work(
        s["bytes"] * 3 * s["N"] * s["D"] + INDEX * s["N"], elementwise=s["N"] * s["D"]
    ),
    "quantise_rows": _elementwise(lambda s: 3 * s["N"] * s["I"], lambda s: s["N"] * s["I"]),
    "quantise_weight": _elementwise(lambda s: 4 * s["O"] * s["I"], lambda s: 3 * s["O"] * s["I"]),
    "pack_in_place": lambda s: Work((s["bytes"] + 1 / 4) * s["E"] * s["O"] * s["I"]),
    "rms_norm": _elementwise(lambda s: 2 * s["N"] * s["D"], lambda s: 6 * s["N"] * s["D"]),
    "add_in_place_and_norm": _elementwise(lambda s: 4 * s["N"] * s["D"], lambda s: 8 * s["N"] * s["D"]),
    "rms_norm_backward": _elementwise(
        lambda s: (4 if s["onto"] else 3) * s["N"] * s["D"], lambda s: 12 * s["N"] * s["D"]
    ),
    "rotate_in_place": _elementwise(
        lambda s: 2 * s["B"] * s["T"] * s["A"] * s["C"], lambda s: 4 * s["B"] * s["T"] * s["A"] * s["C"]
    ),
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_with_cache": _attention_with_cache,
    "gated_activation": _elementwise(lambda s: 3 * s["N"] * s["F"], lambda s: 4 * s["N"] * s["F"]),
    "gated_activation_backward": _elementwise(
        lambda s: 5 * s["N"] * s["F"], lambda s: 8 * s["N"] * s["F"]
    ),
    "route": lambda s: Work(
        s["bytes"] * (2 * s["M"] * s["E"] + s["M"] * s["K"] + s["M"]) + INDEX * s["M"] * s["K"],
        elementwise=(3 + s["K"]) * s["M"] * s["E"],
    ),
    "route_backward": lambda s: Work(
        s["bytes"] * (2 * s["M"] * s["E"] + 3 * s["M"] * s["K"]) + INDEX * s["M"] * s["K"],
        elementwise=8 * s["M"] * s["E"],
    ),
    "add_router_statistics": lambda s: Work(
        s["bytes"] * s["M"] * s["E"] + INDEX * 2 * s["M"] * s["K"], elementwise=s["M"] * s["E"]
    ),
    "dispatch": lambda s: Work(INDEX * (4 * s["M"] * s["K"] + s["E"])),
    "expert_ffn": _expert_ffn,
    "expert_ffn_backward": _expert_ffn_backward,
    # The logits, a chunk at a time: written, and read for their log-sum-exp.
    "token_nll": lambda s: Work(
        s["bytes"] * (s["N"] * s["D"] + s["V"] * s["D"] + 2 * s["N"] * s["V"]),
        products=2 * s["N"] * s["D"] * s["V"],
        elementwise=3 * s["N"] * s["V"],
    ),
    # Besides, made their own gradient in place, which two products read.
    "token_nll_and_gradient": lambda s: Work(
        s["bytes"] * (2 * s["N"] * s["D"] + 3 * s["V"] * s["D"] + 4 * s["N"] * s["V"]),
        products=6 * s["N"] * s["D"] * s["V"],
        elementwise=5 * s["N"] * s["V"],
    ),
    "add_sum_of_squares": _elementwise(lambda s: s["P"], lambda s: 2 * s["P"]),
    "adamw_in_place": _elementwise(lambda s: 8 * s["P"], lambda s: 24 * s["P"]),
}
"""Operation -> its floor; the numbers are those of its section Cost in `operations.table`."""


# ---- the calls -------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of an operation, by what it costs depends on."""

    operation: str
    sizes: tuple[tuple[str, int], ...]  # sorted

    @property
    def letters(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def floor(self) -> Work:
        return FLOORS[self.operation](self.letters)

    def __str__(self) -> str:
        shown = [f"{letter} {size:,}" for letter, size in self.sizes if len(letter) == 1 and size > 1]
        return f"{self.operation} ({', '.join(shown)})"


def sizes_of(values: Mapping[str, Any], promise: Promise) -> dict[str, int]:
    """The letters of a call's arrays by name.

    Besides `bytes` of a float, `weights`: how many there are, `integer`: whether they are quantised,
    and `onto`: whether the gradient is added to another.
    """
    sizes = {"bytes": 4, "weights": 0, "integer": 0, "onto": 0}
    for name, value in values.items():
        if isinstance(value, BitWeight | PackedWeight):
            sizes["integer"] = 1
        if name.startswith(("w_", "gate_up_E", "down_E")):
            sizes["weights"] += math.prod(value.shape)
        if name.startswith("onto_NI") or (name == "onto_ND" and "dy_ND" in values):
            sizes["onto"] = int(value is not None)
        for label, array, shape in arrays_in(name, value):
            axes = axes_of(label.partition(".")[2] or label)
            if axes is not None and len(axes) == len(shape):
                for axis, size in zip(axes, shape, strict=True):
                    if not axis.isdigit():
                        sizes[axis[-1]] = size // (2 if len(axis) == 2 else 1)
            if label.rpartition(".")[2] not in promise.dtypes:
                sizes["bytes"] = array.dtype.itemsize
    if "Z" in sizes:
        sizes.setdefault("E", sizes["Z"] - 1)
    return sizes


class _Noted:
    """A call that is written down when it is complete: some letters are in its results alone."""

    def __init__(self, operation: str, promise: Promise, calls: list[Call]) -> None:
        self._operation, self._promise, self._calls = operation, promise, calls
        self._values: dict[str, Any] = {}

    def enter(self, arguments: Mapping[str, Any]) -> None:
        self._values |= arguments

    def leave(self, results: Sequence[Any]) -> None:
        self._values |= dict(zip(self._promise.results, results, strict=False))
        sizes = sizes_of(self._values, self._promise)
        self._calls.append(Call(self._operation, tuple(sorted(sizes.items()))))


class Recorder(Door):
    """The operations of a backend, and every call of them in order."""

    def __init__(self, ops: Operations) -> None:
        super().__init__(ops)
        self.calls: list[Call] = []

    def visit(self, operation: str, promise: Promise) -> _Noted:
        """See `Door.visit`."""
        return _Noted(operation, promise, self.calls)


class ShapesOnly:
    """Operations on arrays of one number, whatever their shape: nothing is computed or allocated."""

    name, prefers_packed = "shapes", False

    def device(self) -> None:
        return None

    def repeated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda fixed, *arrays: work(fixed, *map(self.to_device, arrays))

    def joined_step(self, branches: Any, **_: Any) -> None:
        return None

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape))

    zeros = empty

    def empty_packed(
        self, experts: int, outputs: int, inputs: int, format: FormatName
    ) -> PackedMatrices:
        code = self.empty((experts, *code_shape(outputs, inputs, format)), np.uint8)
        return PackedMatrices(code, outputs, inputs, format)

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def buffer_bytes(self) -> int:
        return 0

    def to_device(self, array: Any) -> Any:
        return self.empty(array.shape, array.dtype)

    def to_host(self, array: Any) -> Any:
        return np.zeros(array.shape, array.dtype)

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        promise = promises().get(operation)
        if promise is None:
            raise AttributeError(operation)
        signature = inspect.signature(getattr(Operations, operation))

        def call(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(None, *arguments, **options).arguments
            named = {name: given[name] for name in promise.arguments if name in given}
            sizes = sizes_of(named, promise)
            if operation == "route":
                sizes["K"] = given["top_k"]
            if operation == "dispatch":
                sizes |= {"R": sizes["M"] * sizes["K"], "Z": given["experts"] + 1}
            found: dict[str, Any] = {}
            for name in promise.results:
                shape = [sizes[a[-1]] * (2 if len(a) == 2 else 1) for a in axes_of(name) or ()]
                dtype = np.dtype(promise.dtypes.get(name, f"f{sizes['bytes']}"))
                found[name] = self.empty(tuple(shape), dtype)
            if operation == "expert_ffn" and given["sub_norm_EF"] is None:
                found["rstd_R"] = None
            return _returned(operation, list(found.values()))

        return call


def _returned(operation: str, arrays: list[Any]) -> Any:
    """An operation's results in the form in which the table returns them."""
    if operation == "route":
        return Routing(*arrays)
    if operation == "dispatch":
        return Dispatch(*arrays)
    if operation == "expert_ffn":
        return arrays[0], ExpertCache(*arrays[1:])
    return tuple(arrays) if len(arrays) > 1 else arrays[0] if arrays else None


def step_calls(config: ModelConfig, sequences: int) -> list[Call]:
    """The operations of one training step of so many whole sequences, in the trainer's order."""
    recorder = Recorder(cast(Operations, ShapesOnly()))
    learner = Learner(
        Parameters(config, np.float32),
        Moments.zeros(config, np.float32),
        updates=0,
        ops=cast(Operations, recorder),
    )
    recorder.calls.clear()
    tokens = np.zeros((sequences, config.max_position_embeddings + 1), np.int64)
    learner.add_gradient([Batch.of(tokens)])
    learner.update(adamw_settings(0, total_steps=1, optimizer=OptimizerConfig()))
    return recorder.calls


def total(calls: Sequence[Call], matmul: str = "float32") -> float:
    """The floor of all calls, one after another, in seconds."""
    return sum(call.floor.seconds(matmul) for call in calls)


# ---- the table -------------------------------------------------------------------------------


def lines(calls: Sequence[Call], tokens: int, matmul: str) -> list[str]:
    """A table of the calls, equal ones together, and the floor of the whole."""
    head = ("x", "GFLOP", "MB", "FLOP/B", "memory us", "math us")
    shown = [f"{'operation':72s}" + "".join(f"{name:>10s}" for name in head) + "  bound"]
    for call, count in Counter(calls).items():
        floor = call.floor
        memory, arithmetic = floor.memory_seconds(), floor.arithmetic_seconds(matmul)
        numbers = [floor.flops / 1e9, floor.bytes / 1e6, floor.intensity]
        numbers += [memory * 1e6, arithmetic * 1e6]
        shown.append(
            f"{call!s:72s}{count:10d}"
            + "".join(f"{number:10.2f}" for number in numbers)
            + ("  memory" if memory > arithmetic else "  arithmetic")
        )
    work = sum((call.floor for call in calls), Work())
    seconds = total(calls, matmul)
    shown.append(
        f"a step of {tokens:,} tokens: {work.flops / 1e12:.2f} TFLOP, {work.bytes / 1e9:.1f} GB; at "
        f"least {seconds * 1e3:.2f} ms in {matmul}, {tokens / seconds / 1e3:,.0f} k tokens/s"
    )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=GPU_SIZES, default="B")
    parser.add_argument("--model", choices=MODELS, default="mhmoe")
    parser.add_argument(
        "--matmul", choices=[rate for rate in RATES if rate != "int8"], default="float32"
    )
    arguments = parser.parse_args()
    config = benchmark_config(arguments.size, arguments.model)
    sequences = GPU_SIZES[arguments.size].batch
    calls = step_calls(config, sequences)
    print("\n".join(lines(calls, sequences * config.max_position_embeddings, arguments.matmul)))


if __name__ == "__main__":
    main()
