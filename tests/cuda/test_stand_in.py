"""The stand-in for CuPy: it offers nothing that CuPy lacks, and refuses what CuPy refuses.

So what works on it is compiled and emulated, not run on a GPU, but asks for nothing impossible there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mhmoe_np.operations.cuda.sources import options_of, source_of
from tests.cuda.backend import cuda_operations, emulated_only
from tests.cuda.emulator import cupy_on_cpu as cupy
from tests.cuda.emulator.cupy_on_cpu import emulation

N = 1000


@pytest.fixture(autouse=True)
def stream() -> Iterator[Any]:
    """A stream of the test's own, and counters at zero."""
    before, own = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    own.use()
    emulation.clear()
    yield own
    before.use()


def on_device(array: np.ndarray) -> Any:
    copy = cupy.empty(array.shape, array.dtype)
    copy.set(array)
    return copy


def add_in_place(x: Any, onto: Any) -> None:
    """One launch: onto += x."""
    module = cupy.RawModule(code=source_of("sums"), options=options_of("float32"))
    module.get_function("add_in_place")((-(-x.size // 256),), (256,), (x, np.int64(x.size), onto))


def test_it_offers_nothing_that_cupy_lacks() -> None:
    """Asked of the real package, which can be imported where there is no GPU."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.cuda.cupy_names"], capture_output=True, text=True, check=False
    )
    if "No module named 'cupy'" in found.stderr:
        pytest.skip("CuPy is not installed: pip install mhmoe-np[test]")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["missing"] == []
    assert {"RawModule", "cuda", "empty", "ndarray"} <= set(answer["offered"])


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: np.ones(3) + x,
        lambda x: x + np.ones(3),
        lambda x: x + 1,
        lambda x: x @ x,
        lambda x: -x,
        lambda x: np.sum(x),
        lambda x: np.asarray(x),
        lambda x: np.concatenate([x, x]),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x[0:1]),
        lambda x: next(iter(x)) > 0,
        lambda x: x[np.array([0])],
        lambda x: x[x],
        lambda x: x[[0, 1]],
        lambda x: x.sum(),
        lambda x: x.astype(np.float64),
        lambda x: x.copy(),
    ],
)
def test_arithmetic_and_numpy_on_the_device_are_refused(mix: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        mix(cupy.empty((3,), np.float32))


def test_only_arrays_and_numbers_of_the_right_shape_and_type_are_assigned() -> None:
    x = cupy.empty((3,), np.float32)
    x[...] = 2
    x[1:] = on_device(np.ones(2, np.float32))
    np.testing.assert_array_equal(x.get(), [2, 1, 1])
    with pytest.raises(TypeError, match="Unsupported"):
        x[...] = np.ones(3, np.float32)
    for other in (np.ones(2, np.float32), np.ones(3)):
        with pytest.raises(ValueError, match="into float32"):
            x[...] = on_device(other)
        with pytest.raises(ValueError, match="into float32"):
            x.set(other)
    with pytest.raises(TypeError, match="numpy"):
        x.set(x)


def test_a_reshape_that_would_copy_is_refused() -> None:
    x = cupy.empty((3, 4), np.float32)
    assert x.reshape(12).shape == x.reshape((2, 6)).reshape(-1).shape == (12,)
    with pytest.raises(ValueError, match="copies"):
        x[:, :2].reshape(-1)


def test_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "device_bytes", 1000)
    cupy.empty((250,), np.float32)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty((251,), np.float32)


# ---- memory that nobody wrote ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fresh_memory_is_nan(dtype: Any) -> None:
    assert np.isnan(cupy.empty((3, 4), dtype).get()).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_fresh_integers_are_below_zero(dtype: Any) -> None:
    assert (cupy.empty((3, 4), dtype).get() == -1).all()


@emulated_only
def test_memory_that_the_workspace_hands_out_again_is_poisoned_again() -> None:
    ops: Any = cuda_operations(keep_buffers=True)
    pointers = []
    for _ in range(2):
        with ops.scope():
            x = ops.empty((5,), np.float32)
            pointers.append(x.data.ptr)
            assert np.isnan(x.get()).all()
            x[...] = 1
    assert pointers[0] == pointers[1]


# ---- counters --------------------------------------------------------------------------------


def test_launches_copies_and_waits_are_counted(stream: Any) -> None:
    x, onto = on_device(np.ones(N, np.float32)), on_device(np.zeros(N, np.float32))
    assert (emulation.uploads, emulation.waits, emulation.launches) == (2, 0, {})
    add_in_place(x, onto)
    add_in_place(x, onto)
    onto[...] = x
    assert emulation.launches == {"add_in_place": 2, "copy": 1}
    onto.get()
    stream.synchronize()
    assert emulation.waits == 2
    emulation.clear()
    assert (emulation.uploads, emulation.waits, emulation.launches) == (0, 0, {})


# ---- graphs ----------------------------------------------------------------------------------


def test_a_graph_does_its_work_when_it_is_played_and_each_time(stream: Any) -> None:
    x, onto = on_device(np.ones(N, np.float32)), on_device(np.zeros(N, np.float32))
    emulation.clear()
    stream.begin_capture()
    add_in_place(x, onto)
    graph = stream.end_capture()
    assert not onto.get().any()
    for played in (1, 2):
        graph.launch(stream=stream)
        assert (onto.get() == played).all()
    assert emulation.graphs_played == 2
    assert emulation.launches == {}


def test_a_graph_reads_what_its_arrays_hold_when_it_is_played(stream: Any) -> None:
    x, onto = on_device(np.ones(N, np.float32)), on_device(np.zeros(N, np.float32))
    stream.begin_capture()
    add_in_place(x, onto)
    graph = stream.end_capture()
    x.set(np.full(N, 7, np.float32))
    graph.launch(stream=stream)
    assert (onto.get() == 7).all()


def test_scratch_that_a_graph_does_not_write_is_nan_in_every_play(stream: Any) -> None:
    slab, out = cupy.empty((4 * N,), np.uint8), cupy.empty((N,), np.float32)
    stream.begin_capture()
    scratch = cupy.ndarray((N,), np.float32, memptr=slab.data)
    out[...] = scratch
    graph = stream.end_capture()
    for _ in range(2):
        out[...] = 0
        slab[...] = 0
        graph.launch(stream=stream)
        assert np.isnan(out.get()).all()


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda stream, x: stream.synchronize(),
        lambda stream, x: x.get(),
        lambda stream, x: x.set(np.zeros(N, np.float32)),
        lambda stream, x: cupy.empty((N,), np.float32),
    ],
)
def test_waiting_allocating_and_copying_are_refused_while_a_graph_is_captured(
    forbidden: Callable[..., Any], stream: Any
) -> None:
    x = cupy.empty((N,), np.float32)
    stream.begin_capture()
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
        forbidden(stream, x)
    stream.end_capture()
