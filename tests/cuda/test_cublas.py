"""cuBLAS by ctypes: its arguments, its errors, how exact its products are, and graphs of them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.errors import UserError
from tests.cuda.backend import cuda_operations, emulated_only, on_the_device
from tests.cuda.emulator import cublas_on_cpu, cupy_on_cpu, has_gpu
from tests.operations.cases import CUDA_NAME, Inputs, agree, of_each_dtype, same_bits

cuda_operations()  # with CuPy or its stand-in: before the backend is imported

import cupy  # noqa: E402

from mhmoe_np.operations.cuda import cublas  # noqa: E402
from mhmoe_np.operations.cuda.backend import CudaOperations  # noqa: E402
from mhmoe_np.operations.cuda.linear import FEW_ROWS, Operand  # noqa: E402

on_the_gpu = pytest.mark.usefixtures("device")
MODES = ["float32", "tf32", "tf32x3"]


@pytest.fixture(params=[pytest.param(CUDA_NAME, marks=on_the_device)])
def device(request: pytest.FixtureRequest) -> Any:
    """What a test runs on, by name: nothing emulated reads as if run on a GPU."""
    return request.param


def operations(matmul: Any = "float32", **options: Any) -> Any:
    return CudaOperations(matmul=matmul, **options)


# ---- what is computed ------------------------------------------------------------------------


@on_the_gpu
@of_each_dtype
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 5, 7), (1, 6, 4), (6, 1, 4), (5, 4, 1), (33, 70, 65)])
def test_a_product_is_of_rows_transposed_where_said(
    dtype: Any,
    transpose_a: bool,
    transpose_b: bool,
    alpha: float,
    beta: float,
    M: int,
    N: int,
    K: int,
) -> None:
    r, ops = Inputs(1, dtype), operations()
    a, b, out = r(M, K), r(K, N), r(M, N)
    expected = dtype(alpha) * (a @ b) + dtype(beta) * out
    size = abs(alpha) * (np.abs(a) @ np.abs(b)) + abs(beta) * np.abs(out)

    def on_device(x: Any) -> Any:
        """A view of wider rows: its leading dimension is not its width."""
        wide = np.full((len(x), x.shape[1] + 3), np.nan, dtype)
        wide[:, 2:-1] = x
        return ops.to_device(wide)[:, 2:-1]

    lhs, rhs = on_device(a.T if transpose_a else a), on_device(b.T if transpose_b else b)
    found = on_device(np.full_like(out, np.nan) if beta == 0 else out)
    flags = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    ops._cublas.gemm(lhs, rhs, found, alpha=alpha, beta=beta, **flags)
    agree(ops.to_host(found), expected, size)


@on_the_gpu
def test_what_is_no_product_is_refused_and_nothing_is_done_for_nothing() -> None:
    ops = operations()
    a, b = ops.zeros((3, 4), np.float32), ops.zeros((4, 5), np.float32)
    out = ops.to_device(np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match="no product"):
        ops._cublas.gemm(a, b, out, transpose_a=True)
    with pytest.raises(TypeError, match="no product"):
        ops._cublas.gemm(a, ops.zeros((4, 5), np.float64), out)
    with pytest.raises(ValueError, match="contiguous last axis"):
        ops._cublas.gemm(ops.zeros((3, 8), np.float32)[:, ::2], b, out)
    nothing = ops.zeros((3, 0), np.float32), ops.zeros((0, 5), np.float32)
    with pytest.raises(ValueError, match="a sum of nothing"):
        ops._cublas.gemm(*nothing, out)
    ops._cublas.gemm(*nothing, out, beta=1.0)
    ops._cublas.gemm(ops.zeros((0, 4), np.float32), b, ops.zeros((0, 5), np.float32))
    np.testing.assert_array_equal(ops.to_host(out), 1)


# ---- how exact it is -------------------------------------------------------------------------


def errors(matmul: Any, rows: int = 150) -> Any:
    """Of y = x @ w.T and of dx and dw, each entry's in proportion to the sum of its terms' sizes."""
    r, ops = Inputs(2, np.float32), operations(matmul)
    x, w, dy = r(rows, 300), r(70, 300), r(rows, 70)
    on_device = [ops.to_device(array) for array in (dy, x, w)]
    dw = ops.zeros((70, 300), np.float32)
    y = ops.linear(on_device[1], on_device[2], None)
    dx = ops.linear_backward(*on_device, dw, None)
    pairs = [(y, x, w.T), (dx, dy, w), (dw, dy.T, x)]
    parts = []
    for found, left, right in pairs:
        left, right = left.astype(np.float64), right.astype(np.float64)
        error = np.abs(ops.to_host(found) - left @ right)
        parts.append((error / (np.abs(left) @ np.abs(right))).reshape(-1))
    return np.concatenate(parts)


@on_the_gpu
def test_each_mode_is_as_exact_as_its_name_says() -> None:
    float32, tf32, tf32x3 = (errors(mode) for mode in MODES)
    assert float32.max() < 2.0**-20
    assert 2.0**-15 < tf32.max() < 2.0**-10  # 10 bits of mantissa, rounded or cut
    # About as good as float32: tensor cores cut the sums that others round. 2.5 times on an H100.
    assert np.sqrt(np.mean(tf32x3**2)) < 3 * np.sqrt(np.mean(float32**2))
    assert tf32x3.max() < 4 * float32.max()


@on_the_gpu
@of_each_dtype
@pytest.mark.parametrize("matmul", MODES)
def test_no_mode_hides_a_number_that_is_not_finite(dtype: Any, matmul: Any) -> None:
    r, ops = Inputs(3, dtype), operations(matmul)
    x, w = r(FEW_ROWS + 9, 6), r(5, 6)
    for n, bad in enumerate([np.nan, np.inf, -np.inf]):
        x[n, n] = bad
    y = ops.to_host(ops.linear(ops.to_device(x), ops.to_device(w), None))
    assert not np.isfinite(y[:3]).any()
    assert np.isfinite(y[3:]).all()


@emulated_only
@pytest.mark.parametrize("matmul", MODES)
@of_each_dtype
def test_the_mode_decides_how_float32_is_multiplied(dtype: Any, matmul: Any) -> None:
    def modes(rows: int) -> list[int]:
        cublas_on_cpu.LIBRARY.math_modes.clear()
        r, ops = Inputs(4, dtype), operations(matmul)
        ops.linear(ops.to_device(r(rows, 5)), ops.to_device(r(4, 5)), None)
        return cublas_on_cpu.LIBRARY.math_modes

    tf32 = dtype is np.float32 and matmul == "tf32"
    tf32x3 = dtype is np.float32 and matmul == "tf32x3"
    assert modes(FEW_ROWS + 1) == ([3] * 3 if tf32x3 else [3 if tf32 else 0])
    assert modes(1) == [3 if tf32 else 0]


def test_float32_in_name_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    for matmul in ("float32", "tf32x3"):
        with pytest.raises(UserError, match=r"NVIDIA_TF32_OVERRIDE=1: .*unset it"):
            operations(matmul)
    operations("tf32")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    operations()


# ---- graphs, and the same again --------------------------------------------------------------


@on_the_gpu
@pytest.mark.parametrize("matmul", MODES)
def test_a_graph_of_products_gives_the_same_bits_whenever_it_is_played(matmul: Any) -> None:
    r, ops = Inputs(5, np.float32), operations(matmul, keep_buffers=True)
    N, D, V = FEW_ROWS + 50, 12, 30
    x, w, b, norm = (ops.to_device(a) for a in (r(N, D), r(V, D), r(V), r(D)))
    target = ops.to_device(r.rng.integers(0, V, N))
    dw, db, dnorm = (ops.zeros(shape, np.float32) for shape in ((V, D), (V,), (D,)))

    def step() -> Any:
        y = ops.linear(x, w, b)
        normed, rstd = ops.rms_norm(x, norm, eps=1e-5)
        nll, dnormed = ops.token_nll_and_gradient(normed, w, target, dw, dnll=0.1)
        dx = ops.rms_norm_backward(dnormed, x, norm, rstd, dnorm)
        return y, nll, ops.linear_backward(y, x, w, dw, db, onto_NI=dx)

    def results(parts: Any) -> list[Any]:
        return [ops.to_host(part) for part in (*parts, dw, db, dnorm)]

    def clear() -> None:
        for sum_ in (dw, db, dnorm):
            sum_[...] = 0

    with ops.scope():
        expected = results(step())
    clear()
    with ops.scope():
        ops._stream.begin_capture()
        parts = step()
        graph = ops._stream.end_capture()
        for _ in range(2):
            graph.launch(ops._stream)
            same_bits(results(parts), expected)
            clear()


@on_the_gpu
@of_each_dtype
@pytest.mark.parametrize("matmul", MODES)
def test_no_rows_leave_gradients_as_they_are(dtype: Any, matmul: Any) -> None:
    r, ops = Inputs(6, dtype), operations(matmul)
    x, w, b, norm = (ops.to_device(a) for a in (r(0, 6), r(4, 6), r(4), r(6)))
    sums = [ops.to_device(a) for a in (r(4, 6), r(4), r(6))]
    before = [ops.to_host(a) for a in sums]
    dw, db, dnorm = sums
    y = ops.linear(x, w, b)
    dx = ops.linear_backward(y, x, w, dw, db)
    normed, rstd = ops.rms_norm(x, norm, eps=1e-5)
    again = ops.rms_norm_backward(normed, x, norm, rstd, dnorm, onto_ND=dx)
    h = ops.gated_activation(x, activation="silu")
    dh = ops.gated_activation_backward(h, x, activation="relu2")
    target = ops.zeros((0,), np.int64)
    nll = ops.token_nll(x, w, target)
    both = ops.token_nll_and_gradient(x, w, target, dw, dnll=1.0)
    found = [part.shape for part in (y, dx, normed, rstd, again, h, dh, nll, *both)]
    assert found == [(0, 4), (0, 6), (0, 6), (0,), (0, 6), (0, 3), (0, 6), (0,), (0,), (0, 6)]
    same_bits([ops.to_host(a) for a in sums], before)


# ---- errors ----------------------------------------------------------------------------------


@pytest.fixture
def library() -> Any:
    yield cublas_on_cpu.LIBRARY
    cublas_on_cpu.LIBRARY.fails_with.clear()


@emulated_only
def test_what_cublas_refuses_is_said_by_its_name(library: Any) -> None:
    ops = operations()
    x = ops.zeros((3, 3), np.float32)
    library.fails_with = {"cublasSgemm_v2": cublas_on_cpu.INVALID_VALUE}
    with pytest.raises(RuntimeError, match=r"^cublasSgemm_v2: CUBLAS_STATUS_INVALID_VALUE$"):
        ops.linear(x, x, None)
    library.fails_with = {"cublasSgemm_v2": cublas_on_cpu.ALLOC_FAILED}
    with pytest.raises(UserError, match=r"CUBLAS_STATUS_ALLOC_FAILED: .* make the model or the batch"):
        ops.linear(x, x, None)
    library.fails_with = {"cublasCreate_v2": cublas_on_cpu.NOT_INITIALIZED}
    with pytest.raises(RuntimeError, match=r"^cublasCreate_v2: CUBLAS_STATUS_NOT_INITIALIZED$"):
        operations()


@emulated_only
def test_a_handle_goes_with_its_operations(library: Any) -> None:
    before = set(library._handles)
    ops = operations()
    assert len(set(library._handles) - before) == 1
    del ops
    assert set(library._handles) == before


@emulated_only
def test_the_stand_in_takes_no_wrong_leading_dimension(library: Any) -> None:
    ops = operations()
    x = ops.zeros((4, 4), np.float32)
    one = ctypes.byref(ctypes.c_float(1))
    place = x.data.ptr
    shape = 0, 0, 4, 4, 4

    def status(lda: int, ldb: int, ldc: int) -> int:
        handle = ops._cublas._handle
        return library.cublasSgemm_v2(handle, *shape, one, place, lda, place, ldb, one, place, ldc)

    assert status(4, 4, 4) == cublas_on_cpu.SUCCESS
    for wrong in ((3, 4, 4), (4, 3, 4), (4, 4, 3)):
        assert status(*wrong) == cublas_on_cpu.INVALID_VALUE


def opener() -> Any:
    return cublas_on_cpu.real_open_library[0] if not has_gpu() else cublas.open_library


def test_without_the_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas, "_places", lambda: iter(["libcublas.so.nowhere"]))
    with pytest.raises(UserError, match=r"needs cuBLAS, .* pip install") as caught:
        opener()()
    assert "\n" not in str(caught.value)


def test_the_library_is_found_beside_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    for version in (12, 13):
        (folder / f"libcublas.so.{version}").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: 12090)
    found = [place for place in cublas._places() if str(tmp_path) in place]
    assert found == [str(folder / f"libcublas.so.{version}") for version in (12, 13)]


@emulated_only
def test_products_are_counted_as_launches() -> None:
    ops = operations()
    x = ops.zeros((3, 3), np.float64)
    before = cupy_on_cpu.emulation.launches["cublasDgemm"]
    ops.linear(x, x, None)
    ops._multiply(Operand(x), Operand(x), ops.empty((3, 3), np.float64))
    assert cupy_on_cpu.emulation.launches["cublasDgemm"] == before + 2
