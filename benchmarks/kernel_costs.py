"""What each kernel of the cuda backend does in a call of an operation: bytes, arithmetic, its bound.

    python -m benchmarks.kernel_costs [--size A|B|paper]

The numbers are those that the comment above each kernel states: what it must read from the device's
memory and write there, rows that several blocks read in turn counting once, as they come from the L2
cache. Their sum over a training step stands beside the step's floor.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.floors import INDEX, Call, Sizes, Work, step_calls, total
from benchmarks.sizes import GPU_SIZES, benchmark_config

# As in the backend's `dispatch.py`, `loss.py`, `norm.py`, `optimiser.py`, `router.py` and `sums.py`.
SEGMENT = 256  # choices that one block counts
CHUNK_BYTES, CHUNK_ROWS = 256 << 20, 128  # of logits
NORM_ROWS = 16  # of a block of the norm's backward
SQUARES = 8192  # numbers that a block squares
STRIP = 256  # rows of router statistics
COUNT, DOUBLE = 4, 8  # bytes


class Launch(NamedTuple):
    """One launch: its kernel by the name without its width or its kind of product, and its work."""

    kernel: str
    work: Work


Launches = Iterator[Launch]


def base_name(kernel: str) -> str:
    """A kernel's name without what its sizes choose: `attention_64`, `gate_up_few`, `silu_gate`."""
    kernel = re.sub(r"_(32|64|128|256|few|tf32|tf32x3)$", "", kernel)
    kernel = re.sub(r"^cublas(Sgemm|Dgemm|GemmEx)(_v2)?$", "gemm", kernel)
    return re.sub(r"^(silu|relu2)_gate", "gate", kernel)


def _gemm(s: Sizes, m: int, k: int, n: int, *, add: bool = False) -> Launch:
    """out [m, n] = a [m, k] @ b [k, n], or added to what is there."""
    numbers = m * k + k * n + (2 if add else 1) * m * n
    return Launch("gemm", Work(s["bytes"] * numbers, products=2 * m * k * n))


def _linear(s: Sizes) -> Launches:
    yield _gemm(s, s["N"], s["I"], s["O"])


def _linear_backward(s: Sizes) -> Launches:
    yield _gemm(s, s["O"], s["N"], s["I"], add=True)
    yield _gemm(s, s["N"], s["O"], s["I"], add=bool(s["onto"]))


def _chunks(s: Sizes) -> Iterator[int]:
    """The rows of each chunk of logits."""
    rows = max(CHUNK_ROWS, CHUNK_BYTES // (s["V"] * s["bytes"]) // CHUNK_ROWS * CHUNK_ROWS)
    for first in range(0, s["N"], rows):
        yield min(rows, s["N"] - first)


def _token_nll(s: Sizes) -> Launches:
    for n in _chunks(s):
        yield _gemm(s, n, s["D"], s["V"])
        yield Launch("nll", Work(s["bytes"] * n * s["V"] + INDEX * n, elementwise=3 * n * s["V"]))


def _token_nll_and_gradient(s: Sizes) -> Launches:
    for n in _chunks(s):
        yield _gemm(s, n, s["D"], s["V"])
        yield Launch("nll", Work(s["bytes"] * 2 * n * s["V"] + INDEX * n, elementwise=5 * n * s["V"]))
        yield _gemm(s, n, s["V"], s["D"])
        yield _gemm(s, s["V"], n, s["D"], add=True)


def _moved(
    kernel: str, numbers: Callable[[Sizes], float], flops: Callable[[Sizes], float]
) -> Callable[[Sizes], Launches]:
    """An operation of one kernel that goes over its numbers once."""

    def launches(s: Sizes) -> Launches:
        yield Launch(kernel, Work(s["bytes"] * numbers(s), elementwise=flops(s)))

    return launches


def _column_sums(s: Sizes, rows: int, columns: int) -> Launches:
    """In two stages, the first of which leaves a row for every 64."""
    part = -(-rows // 64)
    yield Launch("column_sums", Work(s["bytes"] * (rows + part) * columns, elementwise=rows * columns))
    yield Launch("column_sums", Work(s["bytes"] * (part + 2) * columns, elementwise=part * columns))


def _rms_norm_backward(s: Sizes) -> Launches:
    N, D = s["N"], s["D"]
    blocks = -(-N // NORM_ROWS)
    numbers = (4 if s["onto"] else 3) * N * D + blocks * D
    yield Launch("rms_norm_backward", Work(s["bytes"] * numbers, elementwise=12 * N * D))
    yield from _column_sums(s, blocks, D)


def _attention(s: Sizes) -> Launches:
    B, T, A, G, C, S = *(s[letter] for letter in "BTAGC"), s.get("S", s["T"])
    seen = T * (S - T) + T * (T + 1) / 2
    numbers = B * C * (2 * T * A + 2 * S * G) + B * A * T
    # Of float32, whatever `matmul` says; so in the backward.
    yield Launch("attention", Work(s["bytes"] * numbers, elementwise=4 * B * A * C * seen))


def _attention_backward(s: Sizes) -> Launches:
    """Scores are computed in both kernels: 7 products in place of the floor's 5."""
    B, T, A, G, C = (s[letter] for letter in "BTAGC")
    row, seen = B * A * T, T * (T + 1) / 2
    yield Launch("attention_dots", Work(s["bytes"] * (2 * row * C + row), elementwise=2 * row * C))
    numbers = B * T * C * (3 * A + 2 * G) + 2 * row
    yield Launch("query_gradient", Work(s["bytes"] * numbers, elementwise=6 * B * A * C * seen))
    numbers = B * T * C * (2 * A + 4 * G) + 2 * row
    yield Launch("key_value_gradient", Work(s["bytes"] * numbers, elementwise=8 * B * A * C * seen))


def _route(s: Sizes) -> Launches:
    M, E, K = s["M"], s["E"], s["K"]
    numbers = 2 * M * E + M * K + M
    yield Launch("route", Work(s["bytes"] * numbers + INDEX * M * K, elementwise=(3 + K) * M * E))


def _route_backward(s: Sizes) -> Launches:
    M, E, K = s["M"], s["E"], s["K"]
    numbers = 2 * M * E + 2 * M * K + M
    yield Launch("route_backward", Work(s["bytes"] * numbers + INDEX * M * K, elementwise=8 * M * E))


def _statistics(s: Sizes) -> Launches:
    M, E, K = s["M"], s["E"], s["K"]
    sums = DOUBLE * (4 * E + 1) * -(-M // STRIP)
    moved = s["bytes"] * (M * E + M) + M + 2 * INDEX * M * K + sums
    yield Launch("router_statistics", Work(moved, elementwise=(1 + K) * M * E))
    yield Launch("add_router_statistics", Work(sums + 2 * DOUBLE * (4 * E + 1)))


def _sorting(choices: int, experts: int) -> Launches:
    """The kernels of `dispatch`."""
    counts = COUNT * -(-choices // SEGMENT) * experts
    yield Launch("count_choices", Work(INDEX * choices + counts))
    yield Launch("place_segments", Work(3 * counts + INDEX * experts))
    yield Launch("place_choices", Work(3 * INDEX * choices + 8 * counts))  # a sector for each count


def _dispatch(s: Sizes) -> Launches:
    yield from _sorting(s["M"] * s["K"], s["E"])


def _embedding_backward(s: Sizes) -> Launches:
    N, D = s["N"], s["D"]
    yield from _sorting(N, s["V"])
    moved = s["bytes"] * 3 * N * D + 3 * INDEX * N
    yield Launch("embedding_backward", Work(moved, elementwise=N * D))


def _expert_ffn(s: Sizes) -> Launches:
    R, U, F, M, E = (s[letter] for letter in "RUFME")
    routes = INDEX * R
    numbers = R * U + 2 * E * F * U + 3 * R * F
    yield Launch(
        "gate_up", Work(s["bytes"] * numbers + routes, products=4 * R * U * F, elementwise=4 * R * F)
    )
    yield Launch("linear", Work(s["bytes"] * (R * F + E * F * U + R * U), products=2 * R * U * F))
    yield Launch("combine", Work(s["bytes"] * (R * U + M * U) + routes, elementwise=2 * R * U))


def _expert_ffn_backward(s: Sizes) -> Launches:
    R, U, F, M, E = (s[letter] for letter in "RUFME")
    routes, weights, products = INDEX * R, E * U * F, 2 * R * U * F
    yield Launch("linear_backward", Work(s["bytes"] * (R * U + weights + R * F) + routes, products))
    yield Launch("rows_backward", Work(s["bytes"] * 7 * R * F + routes, elementwise=24 * R * F))
    numbers = R * U + R * F + 2 * weights
    yield Launch("weight_gradient", Work(s["bytes"] * numbers + routes, products))
    numbers = 2 * R * F + R * U + 4 * weights
    yield Launch("weight_gradient", Work(s["bytes"] * numbers + routes, 2 * products))
    numbers = 2 * R * F + 2 * weights + R * U
    yield Launch("linear_backward", Work(s["bytes"] * numbers, 2 * products))
    yield Launch("combine_backward", Work(s["bytes"] * (R * U + M * U) + routes, elementwise=R * U))


def _add_sum_of_squares(s: Sizes) -> Launches:
    P, sums = s["P"], DOUBLE * -(-s["P"] // SQUARES)
    yield Launch("sum_of_squares", Work(s["bytes"] * P + sums, elementwise=2 * P))
    yield Launch("add_sum_of_squares", Work(sums))


def _adamw(s: Sizes) -> Launches:
    yield Launch("adamw_begins", Work(0))
    yield Launch("adamw", Work(s["bytes"] * 8 * s["P"], elementwise=28 * s["P"]))
    yield Launch("adamw_ends", Work(0))


LAUNCHES: dict[str, Callable[[Sizes], Launches]] = {
    "add_in_place": _moved("add_in_place", lambda s: 3 * s["N"] * s["D"], lambda s: s["N"] * s["D"]),
    "add_sum": _moved("add_sum", lambda s: s["N"], lambda s: s["N"]),
    "linear": _linear,
    "linear_backward": _linear_backward,
    "embedding": lambda s: iter(
        [Launch("embedding", Work(s["bytes"] * 2 * s["N"] * s["D"] + INDEX * s["N"]))]
    ),
    "embedding_backward": _embedding_backward,
    "rms_norm": _moved("rms_norm", lambda s: 2 * s["N"] * s["D"], lambda s: 4 * s["N"] * s["D"]),
    "add_in_place_and_norm": _moved(
        "add_in_place_and_norm", lambda s: 4 * s["N"] * s["D"], lambda s: 5 * s["N"] * s["D"]
    ),
    "rms_norm_backward": _rms_norm_backward,
    "rotate_in_place": _moved(
        "rotate_in_place",
        lambda s: 2 * s["B"] * s["T"] * s["A"] * s["C"],
        lambda s: 3 * s["B"] * s["T"] * s["A"] * s["C"],
    ),
    "attention": _attention,
    "attention_backward": _attention_backward,
    "gated_activation": _moved("gate", lambda s: 3 * s["N"] * s["F"], lambda s: 4 * s["N"] * s["F"]),
    "gated_activation_backward": _moved(
        "gate_backward", lambda s: 5 * s["N"] * s["F"], lambda s: 8 * s["N"] * s["F"]
    ),
    "route": _route,
    "route_backward": _route_backward,
    "add_router_statistics": _statistics,
    "dispatch": _dispatch,
    "expert_ffn": _expert_ffn,
    "expert_ffn_backward": _expert_ffn_backward,
    "token_nll": _token_nll,
    "token_nll_and_gradient": _token_nll_and_gradient,
    "add_sum_of_squares": _add_sum_of_squares,
    "adamw_in_place": _adamw,
}
"""Operation -> its launches in order, with float weights and without sub-norms."""


def launches_of(call: Call) -> list[Launch]:
    """Every launch of one call."""
    return list(LAUNCHES[call.operation](call.letters))


def total_of_kernels(calls: Sequence[Call], matmul: str = "float32") -> float:
    """Seconds of all launches, one after another, each as fast as its bound allows."""
    return sum(launch.work.seconds(matmul) for call in calls for launch in launches_of(call))


def lines(calls: Sequence[Call], matmul: str) -> list[str]:
    """A table of the kernels by operation, and their sum beside the floor."""
    work: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for call in calls:
        for kernel, done in launches_of(call):
            work[call.operation, kernel].append(done)
    head = ("x", "GFLOP", "MB", "FLOP/B", "us")
    shown = [f"{'operation':26s}{'kernel':24s}" + "".join(f"{name:>10s}" for name in head) + "  bound"]
    for (operation, kernel), each in work.items():
        done, seconds = sum(each, Work()), sum(part.seconds(matmul) for part in each)
        numbers = done.flops / 1e9, done.bytes / 1e6, done.intensity, seconds * 1e6
        bound = "memory" if done.memory_seconds() > done.arithmetic_seconds(matmul) else "arithmetic"
        shown.append(
            f"{operation:26s}{kernel:24s}{len(each):10d}"
            + "".join(f"{number:10.2f}" for number in numbers)
            + f"  {bound}"
        )
    kernels, floor = total_of_kernels(calls, matmul), total(calls, matmul)
    shown.append(
        f"all kernels {kernels * 1e3:.2f} ms in {matmul}, the floor {floor * 1e3:.2f} ms: "
        f"{kernels / floor:.3f} times"
    )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=GPU_SIZES, default="B")
    parser.add_argument("--matmul", choices=("float32", "tf32", "tf32x3"), default="float32")
    arguments = parser.parse_args()
    config = benchmark_config(arguments.size, "mhmoe")
    print("\n".join(lines(step_calls(config, GPU_SIZES[arguments.size].batch), arguments.matmul)))


if __name__ == "__main__":
    main()
