"""Mistakes of the usual kinds, planted in kernels: each is caught. Compiled and emulated, not on a GPU.

What only a sanitizer catches is in `test_sanitizers.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhmoe_np.operations.cuda.sources import options_of, source_of
from tests.cuda import toolchain
from tests.cuda.backend import ORDERS
from tests.cuda.emulator import cupy_on_cpu as cupy
from tests.cuda.emulator.cupy_on_cpu import emulation
from tests.cuda.toolchain import (
    Compiled,
    compile_with_nvcc,
    compile_with_nvrtc12,
    float_atomics,
)

ARCHITECTURES = toolchain.ARCHITECTURES["float32"]
OPTIONS = options_of("float32")
BARRIER = "__syncthreads();"
KERNEL = 'extern "C" __global__ void __launch_bounds__(64) planted'
N = 1000


@pytest.fixture(autouse=True)
def _threads_as_numbered() -> Any:
    emulation.order_seed = 0
    yield
    emulation.order_seed = 0


def on_device(array: np.ndarray) -> Any:
    copy = cupy.empty(array.shape, array.dtype)
    copy.set(array)
    return copy


def kernel(name: str, old: str = "", new: str = "") -> Any:
    """Of sums.cu, with a mistake in place of `old`."""
    source = source_of("sums")
    assert old in source
    return cupy.RawModule(code=source.replace(old, new, 1), options=OPTIONS).get_function(name)


def small(body: str, parameters: str = "int* out") -> Any:
    """A kernel of its own."""
    code = source_of("sums") + f"\n{KERNEL}({parameters}) {{ {body} }}\n"
    return cupy.RawModule(code=code, options=OPTIONS).get_function("planted")


def sum_by(launch: Any) -> float:
    """The sum of 0 to N - 1 by a kernel like `add_sum`."""
    total = on_device(np.zeros(1))
    launch((1,), (256,), (on_device(np.arange(N, dtype=np.float32)), np.int64(N), total))
    return float(total.get()[0])


def test_a_missing_barrier_shows_in_some_order() -> None:
    results: dict[str, list[float]] = {"right": [], "wrong": []}
    for emulation.order_seed in ORDERS:
        results["right"].append(sum_by(kernel("add_sum")))
        results["wrong"].append(sum_by(kernel("add_sum", BARRIER, "")))
    assert results["right"] == [N * (N - 1) / 2] * len(ORDERS)
    # Shared memory that nobody wrote yet is NaN.
    assert any(np.isnan(results["wrong"]))


def test_barriers_on_different_lines_are_reported() -> None:
    apart = f"if (thread < 64)\n{BARRIER}\nelse\n{BARRIER}"
    with pytest.raises(RuntimeError, match=r"different __syncthreads: kernel.cu:\d+ and kernel.cu:\d+"):
        sum_by(kernel("add_sum", BARRIER, apart))


def test_a_barrier_that_some_threads_never_reach_is_reported() -> None:
    # Threads of a warp that still run wait for each other in two places.
    with pytest.raises(
        RuntimeError, match="deadlock: 1 threads at __syncthreads, 31 at a warp's barrier"
    ):
        small(f"if (threadIdx.x == 3) {BARRIER} __syncwarp();")(
            (1,), (32,), (on_device(np.zeros(1, np.int32)),)
        )


@pytest.mark.parametrize(
    ("order", "match"), [(0, "a lane outside its mask"), (1, "mask that lacks it")]
)
def test_a_shuffle_with_a_wrong_mask_is_reported(order: int, match: str) -> None:
    emulation.order_seed = order  # which lane comes first
    with pytest.raises(RuntimeError, match=match):
        sum_by(kernel("add_sum", "__shfl_xor_sync(ALL_LANES", "__shfl_xor_sync(1"))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("out[0] = __shfl_sync(0xffff, threadIdx.x, 20);", "reads a lane outside its mask"),
        ("out[0] = threadIdx.x < 16 ? __shfl_sync(~0u, 1, 0) : (int)__ballot_sync(~0u, 1);", "wait at"),
        ("out[0] = __shfl_sync(threadIdx.x < 16 ? ~0u : ~1u, 1, 20);", "different masks"),
    ],
)
def test_lanes_that_do_not_meet_are_reported(body: str, match: str) -> None:
    only = "if (threadIdx.x < 16) " if "0xffff" in body else ""
    with pytest.raises(RuntimeError, match=match):
        small(only + body)((1,), (32,), (on_device(np.zeros(1, np.int32)),))


def test_a_lane_that_is_missing_from_a_shuffle_is_reported() -> None:
    with pytest.raises(
        RuntimeError, match="deadlock: 0 threads at __syncthreads, 31 at a warp's barrier"
    ):
        small("if (threadIdx.x) out[0] = sum_of_lanes(1);")((1,), (32,), (cupy.empty((1,), np.int32),))


def test_an_output_that_nobody_writes_is_nan() -> None:
    out = cupy.empty((N,), np.float32)
    small("if (threadIdx.x % 2) out[threadIdx.x] = 1;", "float* out")((1,), (64,), (out,))
    found = out.get()[:64]
    assert np.isnan(found[::2]).all()
    assert (found[1::2] == 1).all()


def test_a_result_that_depends_on_the_order_of_threads_or_blocks_shows() -> None:
    results = set()
    for emulation.order_seed in ORDERS:
        last = on_device(np.zeros(1, np.int32))
        small("out[0] = blockIdx.x * 64 + threadIdx.x;")((4,), (64,), (last,))
        results.add(int(last.get()[0]))
    assert len(results) == len(ORDERS)


# ---- launches and their arguments ------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (1, np.int32(N), "argument 1 is 'i', the parameter 'q'"),
        (1, np.float32(N), "argument 1 is 'f', the parameter 'q'"),
        (1, N, "argument 1 is <class 'int'>"),
        (0, np.arange(N, dtype=np.float32), "argument 0 is <class 'numpy.ndarray'>"),
        (0, np.zeros(N), "argument 0 is <class 'numpy.ndarray'>"),
        (2, cupy.empty((1,), np.float32), "argument 2 is 'pf', the parameter 'pd'"),
        (2, np.float64(0), "argument 2 is 'd', the parameter 'pd'"),
    ],
)
def test_an_argument_of_another_type_is_refused(place: int, wrong: Any, match: str) -> None:
    arguments = [cupy.empty((N,), np.float32), np.int64(N), cupy.empty((1,), np.float64)]
    arguments[place] = wrong
    with pytest.raises(TypeError, match=match):
        kernel("add_sum")((1,), (256,), tuple(arguments))


def test_arguments_too_few_or_too_many_are_refused() -> None:
    for count in (0, 2):
        with pytest.raises(TypeError, match=f"{count} arguments for 1 parameters"):
            small("out[0] = 1;")((1,), (1,), (cupy.empty((1,), np.int32),) * count)


@pytest.mark.parametrize(
    ("grid", "block", "match"),
    [
        ((1,), (65,), "__launch_bounds__"),
        ((1,), (0,), "a block of"),
        ((0,), (32,), "a grid of"),
        ((1, 65536), (32,), "a grid of"),
    ],
)
def test_an_impossible_launch_is_refused(grid: Any, block: Any, match: str) -> None:
    launch = small("out[0] = 1;")
    with pytest.raises((RuntimeError, ValueError), match=match):
        launch(grid, block, (cupy.empty((1,), np.int32),))


# ---- what compilers refuse -------------------------------------------------------------------


def test_floats_added_atomically_do_not_compile_for_the_emulator() -> None:
    with pytest.raises(RuntimeError, match="floats are never added atomically"):
        small("atomicAdd(out, 1.0f);", "float* out")


def planted_kernel(name: str, parameters: str, body: str) -> str:
    return f'extern "C" __global__ void __launch_bounds__(1024) {name}({parameters}) {{ {body} }}\n'


def shared_sum(real: str) -> str:
    return f"__shared__ {real} sum; atomicAdd(&sum, out[threadIdx.x]); {BARRIER} out[0] = sum;"


FLOATS = {
    f"{place}_{real}": planted_kernel(f"{place}_{real}", f"{real}* out", body)
    for real in ("float", "double")
    for place, body in {
        "unread": f"atomicAdd(out, ({real})1);",
        "read": f"out[1] = atomicAdd(out, ({real})1);",
        "shared": shared_sum(real),
    }.items()
}
INTEGERS = planted_kernel(
    "integers",
    "int* out, unsigned long long* long_out",
    "__shared__ unsigned long long sum; __shared__ int count; atomicAdd(&count, 1); atomicMax(out, 3);"
    f"atomicAdd(&sum, long_out[1]); {BARRIER} long_out[0] = sum; atomicAdd(out, count);",
)
INDEXED = planted_kernel(
    "indexed",
    "float* out, int N",
    "float x[32];\n#pragma unroll 1\nfor (int i = 0; i < N; ++i) x[i * i & 31] = out[i]; "
    "out[0] = x[N & 15];",
)


with_compilers = pytest.mark.skipif(not toolchain.IS_HERE, reason="no wheels of the compilers")


@pytest.fixture(scope="module")
def machine_code() -> Compiled:
    """Of what compiles without a warning and should not be there."""
    source = "".join([*FLOATS.values(), INTEGERS, INDEXED])
    compiled = compile_with_nvcc(source, OPTIONS, ARCHITECTURES, ARCHITECTURES)
    assert compiled.log == ""
    assert set(compiled.instructions) == set(compiled.resources) == set(ARCHITECTURES)
    return compiled


@with_compilers
@pytest.mark.parametrize("name", FLOATS)
def test_floats_added_atomically_are_seen_in_machine_code(name: str, machine_code: Compiled) -> None:
    for kernels in machine_code.instructions.values():
        assert float_atomics(kernels[name])


@with_compilers
def test_integers_added_atomically_are_none_of_them(machine_code: Compiled) -> None:
    for kernels in machine_code.instructions.values():
        assert any("ATOMS" in instruction for instruction in kernels["integers"])
        assert float_atomics(kernels["integers"]) == []


@with_compilers
def test_an_array_that_is_indexed_at_run_time_is_seen(machine_code: Compiled) -> None:
    for resources in machine_code.resources.values():
        assert resources["indexed"].stack_bytes > 0  # which no warning told


@with_compilers
def test_registers_that_spill_are_refused() -> None:
    values = range(80)  # 1024 threads have 64 registers each
    body = "".join(f"float x{i} = out[{i} * 64 + threadIdx.x];" for i in values) + BARRIER
    body += "".join(f"out[{i} * 65 + threadIdx.x] = x{i} * x{(i * 7 + 3) % 80};" for i in values)
    source = planted_kernel("spills", "float* out", body)
    assert "spill" in compile_with_nvcc(source, OPTIONS, [90], []).log
    assert "spill" in compile_with_nvrtc12(source, OPTIONS, 90)


@with_compilers
def test_too_much_shared_memory_is_refused() -> None:
    body = f"__shared__ float x[12289]; x[threadIdx.x] = out[0]; {BARRIER} out[1] = x[(int)out[0]];"
    source = planted_kernel("hoards", "float* out", body)
    assert "too much shared data" in compile_with_nvrtc12(source, OPTIONS, 90)
