"""Packed products beside float32: single matrices, experts, whole models.

    python -m benchmarks.packed [--only matrices|experts|models] [--threads 1 2] [--isa NAME]
                                [--blas own|openblas|mkl] [--json]

Everything of one row of the report runs in one process, in short bursts by turns; figures are minima,
so weights that fit a cache are found there, on both sides. Our side always includes the quantisation of
the activations, and for experts the gathering of rows, the activation and the gated sum as well, where
the other side is the bare matrix products of NumPy. PyTorch, where it is installed, is measured in
float32 and with its dynamically quantised int8 linear. A model's two sides are our own decoding, packed
and in float32, of one token at a time and of a prompt of 512. `--blas` chooses for them; beside single
matrices and experts it is always NumPy's BLAS that multiplies. Each row says which it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.machines import add_blas_option, described, use_blas
from mhmoe_np.costs.model import macs_per_token
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.packed import pack_weights
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations.blas import blas_of
from mhmoe_np.operations.load import cores
from mhmoe_np.operations.packing import FORMATS, FormatName, pack
from mhmoe_np.operations.processor import processor
from mhmoe_np.operations.table import Blas, PackedWeight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS, PAPER_MODELS

if TYPE_CHECKING:
    from mhmoe_np.operations.numba_cpu import NumbaOperations
    from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet

SIZES = (768, 2048, 4096)
ROWS = (1, 16, 64, 256)
EXPERTS = {"384x768": (384, 768), "256x512": (256, 512)}  # U x F of the paper's MH-MoE
EXPERT_COUNT = 16
ROWS_OF_AN_EXPERT = (1, 16, 256)
PROMPT, DECODED = 512, 24
BURST_SECONDS = 3e-3

Row = dict[str, Any]
Call = Callable[[], object]


def fastest(
    calls: dict[str, Call], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The shortest time of each call by `clock`, in bursts by turns, for about `seconds` each."""
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            burst = time.perf_counter() + BURST_SECONDS
            while time.perf_counter() < burst:
                before = clock()
                call()
                spent = clock() - before
                if spent > 0:  # a clock that stood still says nothing
                    best[name] = min(best[name], spent)
        rounds += 1
    return best


def packed_matrices(
    rng: np.random.Generator, shape: tuple[int, int, int], format: FormatName
) -> PackedWeight:
    """Random integers of a format, and scales."""
    _, _, base, lowest, step = FORMATS[format]
    q_EOI = lowest + step * rng.integers(0, base, shape, dtype=np.int8)
    return PackedWeight(pack(q_EOI, format), rng.random(shape[:2], dtype=np.float32))


def torch_calls(x: np.ndarray, w: np.ndarray, threads: int) -> dict[str, Call]:
    """PyTorch's float32 and int8 linear maps, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(threads)
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data[...] = torch.from_numpy(w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eight_bit = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
        )
    given = torch.from_numpy(x)

    def run(module: Any) -> Call:
        def call() -> object:
            with torch.inference_mode():
                return module(given)

        return call

    return {"torch-float32": run(linear), "torch-int8": run(eight_bit)}


def report(
    case: str,
    rows: int,
    threads: int,
    isa: str,
    format: str,
    ratio: float,
    gops: float,
    blas: Blas | None,
) -> Row:
    return {
        "case": case,
        "rows": rows,
        "threads": threads,
        "isa": isa,
        "format": format,
        "ratio_to_sgemm": round(ratio, 2),
        "gops": round(gops, 1),
        "blas": None if blas is None else described(blas._asdict()),
    }


def matrices(
    backends: dict[InstructionSet, NumbaOperations], threads: int, seconds: float
) -> Iterator[Row]:
    """K = N in SIZES: one linear map."""
    rng = np.random.default_rng(0)
    for size in SIZES:
        w = rng.standard_normal((size, size), dtype=np.float32)
        packed = {name: packed_matrices(rng, (1, size, size), name) for name in FORMATS}
        for rows in ROWS:
            x = rng.standard_normal((rows, size), dtype=np.float32)
            y = np.empty_like(x)
            calls: dict[str, Call] = {"sgemm": partial(np.matmul, x, w.T, out=y)}
            for isa, ops in backends.items():
                for name, weight in packed.items():
                    calls[f"{isa} {name}"] = partial(ops.linear, x, weight, None)
            calls |= {f"- {name}": call for name, call in torch_calls(x, w, threads).items()}
            best = fastest(calls, seconds)
            for name, spent in best.items():
                if name != "sgemm":
                    isa_name, _, format = name.partition(" ")
                    gops = 2 * rows * size * size / spent / 1e9
                    ratio = best["sgemm"] / spent
                    yield report(
                        *(f"linear {size}", rows, threads, isa_name, format, ratio, gops),
                        blas_of("numpy"),
                    )


def expert_products(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> None:
    """The bare float32 products of an equal number of rows for each expert."""
    for rows, w_in, w_out in zip(np.split(x, len(down)), gate_up, down, strict=True):
        h = np.matmul(rows, w_in.T)
        np.matmul(h[:, : w_out.shape[1]], w_out.T)


def experts(
    backends: dict[InstructionSet, NumbaOperations], threads: int, seconds: float
) -> Iterator[Row]:
    """The paper's experts, each with the same number of rows."""
    rng = np.random.default_rng(0)
    E = EXPERT_COUNT
    for name, (U, F) in EXPERTS.items():
        gate_up = rng.standard_normal((E, 2 * F, U), dtype=np.float32)
        down = rng.standard_normal((E, U, F), dtype=np.float32)
        sub_norm = np.ones((E, F), np.float32)
        packed = {
            format: (
                packed_matrices(rng, gate_up.shape, format),
                packed_matrices(rng, down.shape, format),
            )
            for format in FORMATS
        }
        for rows in ROWS_OF_AN_EXPERT:
            x = rng.standard_normal((E * rows, U), dtype=np.float32)
            expert_MK = (np.arange(E * rows) % E)[:, None]
            gate_MK = np.ones((E * rows, 1), np.float32)

            calls: dict[str, Call] = {"sgemm": partial(expert_products, x, gate_up, down)}
            for isa, ops in backends.items():
                sent = ops.dispatch(expert_MK, experts=E, capacity=None)
                for format, weights in packed.items():
                    calls[f"{isa} {format}"] = partial(
                        ops.expert_ffn,
                        *(x, gate_MK, sent, *weights, sub_norm),
                        activation="silu",
                        eps=1e-5,
                    )
            best = fastest(calls, seconds)
            for key, spent in best.items():
                if key != "sgemm":
                    isa_name, _, format_name = key.partition(" ")
                    gops = 2 * E * rows * 3 * U * F / spent / 1e9
                    ratio = best["sgemm"] / spent
                    yield report(
                        *(f"experts {name}", rows, threads, isa_name, format_name, ratio, gops),
                        blas_of("numpy"),
                    )


def model_of(preset: str, format: FormatName | None, ops: NumbaOperations) -> Model:
    """A paper-sized model with random weights, packed or in float32."""
    settings = MODEL_PRESETS[preset].model_dump(exclude_unset=True)
    if format is not None:
        settings["quantization"] = "bitnet" if format == "sign-1bit" else "bitnet_b158"
    config = ModelConfig.model_validate(settings)
    parameters = Parameters(config, np.float32)
    initialise(parameters, seed=0)
    if format is None:
        return Model.of(parameters.to_device(ops), ops=ops)
    assert format in formats_for(config)
    weights = pack_weights(parameters.to_device(ops), format, ops=ops)
    return Model.with_weights(config, weights, ops=ops)


def seconds_a_token(model: Model, ops: NumbaOperations) -> tuple[float, float]:
    """Of decoding after a prompt (the fastest token), and of the prompt itself."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (1, PROMPT + DECODED))
    cache = KeyValueCache(model, sequences=1, positions=PROMPT + DECODED, ops=ops)
    start = time.perf_counter()
    cache.extend(ids[:, :PROMPT])
    prefill = (time.perf_counter() - start) / PROMPT
    tokens = []
    for position in range(PROMPT, PROMPT + DECODED):
        start = time.perf_counter()
        cache.extend(ids[:, position : position + 1])
        tokens.append(time.perf_counter() - start)
    return min(tokens), prefill


def models(
    ops: NumbaOperations, isa: str, threads: list[int], formats: list[FormatName], repeats: int
) -> Iterator[Row]:
    """The presets of the paper's size, one after the other."""
    for kind in PAPER_MODELS:
        preset = f"paper-{kind}"
        float32 = model_of(preset, None, ops)
        for format in formats:
            packed = model_of(preset, format, ops)
            for count in threads:
                numba.set_num_threads(count)
                turns = [
                    [seconds_a_token(model, ops) for model in (packed, float32)] for _ in range(repeats)
                ]
                for i, (what, rows) in enumerate((("decode", 1), ("prefill", PROMPT))):
                    ours, theirs = (min(turn[side][i] for turn in turns) for side in (0, 1))
                    macs = macs_per_token(float32.config, sequence=0)  # without attention's scores
                    if what == "prefill":
                        del macs["output head"]
                    row = report(
                        *(f"{what} {preset}", rows, count, isa, format),
                        theirs / ours,
                        2 * sum(macs.values()) / ours / 1e9,
                        ops.blas(),
                    )
                    yield row | {
                        "tokens_per_s": round(1 / ours, 1),
                        "float32_tokens_per_s": round(1 / theirs, 1),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["matrices", "experts", "models"], action="append")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}))
    parser.add_argument("--isa", nargs="+", help="names of instruction sets; default: the fastest")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--repeats", type=int, default=3, help="turns of a whole model")
    parser.add_argument("--model-formats", nargs="+", default=["ternary-2bit"], choices=FORMATS)
    parser.add_argument("--json", action="store_true")
    add_blas_option(parser)
    arguments = parser.parse_args()
    use_blas(arguments.blas)
    rows: list[Row] = []
    if not arguments.json:
        print(processor())
        print(
            f"{'case':32s}{'rows':>5s}{'threads':>8s}  {'isa':12s}{'format':14s}"
            f"{'ratio':>7s}{'gops':>9s}"
        )
    for row in measured(arguments):
        rows.append(row)
        if not arguments.json:
            show(row)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every row that was asked for."""
    # Here and not above: the backend is bound to its BLAS when it is imported.
    from mhmoe_np.operations.numba_cpu import NumbaOperations
    from mhmoe_np.operations.numba_cpu.instruction_set import choose

    only = arguments.only or ["matrices", "experts", "models"]
    backends = {isa: NumbaOperations(instruction_set=isa) for isa in arguments.isa or [choose()]}
    for threads in arguments.threads:
        numba.set_num_threads(threads)
        # After the backends, which limit BLAS to one thread: our side has its own parallelism.
        with threadpool_limits(threads, user_api="blas"):
            if "matrices" in only:
                yield from matrices(backends, threads, arguments.seconds)
            if "experts" in only:
                yield from experts(backends, threads, arguments.seconds)
    if "models" in only:
        isa, ops = next(iter(backends.items()))
        yield from models(ops, isa, arguments.threads, arguments.model_formats, arguments.repeats)


def show(row: Row) -> None:
    """A line of the table."""
    line = (
        f"{row['case']:32s}{row['rows']:5d}{row['threads']:8d}  {row['isa']:12s}{row['format']:14s}"
        f"{row['ratio_to_sgemm']:7.2f}{row['gops']:9.1f}"
    )
    if "tokens_per_s" in row:
        line += f"  {row['tokens_per_s']:.1f} against {row['float32_tokens_per_s']:.1f} tokens/s"
    print(line, flush=True)


if __name__ == "__main__":
    main()
