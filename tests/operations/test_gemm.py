"""Products in compiled code: strided blocks of larger arrays, accumulated, at edges, by each BLAS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mhmoe_np.operations.blas import VARIABLE, BlasName
from mhmoe_np.operations.numba_cpu import own_product
from mhmoe_np.operations.numba_cpu.blas_libraries import mkl_libraries, own, product
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.gemm import BLAS, gemm_nn, gemm_nt, gemm_tn
from tests.operations.cases import SEEDS, of_each_dtype, quick

ROOT = Path(__file__).parents[2]
FORMS = ("nt", "nn", "tn")
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([16, 33, 70]))


@task
def multiply(form: Any, alpha: Any, a: Any, b: Any, beta: Any, c: Any, at: Any) -> None:
    """The product on the blocks that begin at `at` in a, b and c and reach to one before their ends."""
    a_block = a[at[0] : a.shape[0] - 1, at[1] : a.shape[1] - 1]
    b_block = b[at[0] : b.shape[0] - 1, at[1] : b.shape[1] - 1]
    c_block = c[at[0] : c.shape[0] - 1, at[1] : c.shape[1] - 1]
    if form == 0:
        gemm_nt(alpha, a_block, b_block, beta, c_block)
    elif form == 1:
        gemm_nn(alpha, a_block, b_block, beta, c_block)
    else:
        gemm_tn(alpha, a_block, b_block, beta, c_block)


@of_each_dtype
@pytest.mark.parametrize("form", FORMS)
@quick(25)
@given(
    SEEDS, st.tuples(SIZES, SIZES, SIZES), st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from([1.0, -0.5]), st.sampled_from([0.0, 1.0, 0.25]),
)  # fmt: skip
@example(0, (0, 3, 2), (0, 0), 1.0, 1.0)
@example(0, (3, 0, 2), (0, 0), 1.0, 1.0)
@example(1, (3, 2, 0), (0, 1), 1.0, 0.25)
@example(1, (3, 2, 0), (0, 1), 1.0, 0.0)
@example(2, (1, 1, 1), (0, 0), 1.0, 0.0)
@example(3, (1, 70, 33), (1, 3), -0.5, 0.25)
def test_a_product_of_blocks_is_the_definitions(
    dtype: Any,
    form: str,
    seed: int,
    sizes: tuple[int, int, int],
    at: tuple[int, int],
    alpha: float,
    beta: float,
) -> None:
    m, n, k = sizes
    rng = np.random.default_rng(seed)
    inside = np.s_[at[0] : -1, at[1] : -1]

    def around(rows: int, columns: int) -> Any:
        return rng.standard_normal((at[0] + rows + 1, at[1] + columns + 1)).astype(dtype)

    a = around(k, m) if form[0] == "t" else around(m, k)
    b = around(n, k) if form[1] == "t" else around(k, n)
    c = around(m, n)
    before = c.astype(np.float64)
    if beta == 0:
        c[inside] = before[inside] = np.nan  # which must not be read
    multiply(FORMS.index(form), alpha, a, b, beta, c, at)

    left, right = (
        block.T if letter == "t" else block
        for block, letter in zip((a[inside], b[inside]), form, strict=True)
    )
    left, right = left.astype(np.float64), right.astype(np.float64)
    added = beta * before[inside] if beta else np.zeros((m, n))
    expected = alpha * (left @ right) + added
    # Each product and each sum rounds once.
    bound = (k + 3) * np.finfo(dtype).eps * (abs(left) @ abs(right) + abs(added))
    assert (abs(c[inside] - expected) <= bound).all()
    c[inside] = before[inside]
    np.testing.assert_array_equal(c, before.astype(dtype))  # around the block nothing was written


@of_each_dtype
def test_a_single_row_may_have_any_stride(dtype: Any) -> None:
    row = np.lib.stride_tricks.as_strided(
        np.arange(5, dtype=dtype), (1, 5), (0, np.dtype(dtype).itemsize)
    )
    matrix, c = np.ones((3, 5), dtype), np.empty((1, 3), dtype)
    gemm_nt(1.0, row, matrix, 0.0, c)
    assert c.tolist() == [[10, 10, 10]]


def others() -> list[Any]:
    """The libraries that this process does not multiply with."""
    lacking = {
        "mkl": "" if mkl_libraries() else "mkl_which_is_not_installed",
        "own": "" if own_product.available() else "own_without_avx2",
        "openblas": "",
    }
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(bool(lacking[name]), reason=lacking[name]),
            id=lacking[name] or name,
        )
        for name in get_args(BlasName)
        if name != BLAS.name
    ]


@pytest.mark.parametrize("name", others())
def test_the_other_library_passes_the_same_tests(name: str) -> None:
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-k", "blocks or stride")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).relative_to(ROOT))],
        cwd=ROOT,
        env=os.environ | {VARIABLE: name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


# ---- our own --------------------------------------------------------------------------------------

ROUND_BLOCKS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 13, 119, 120, 121, 123, 126, 250])
ROUND_PANELS = st.sampled_from([1, 7, 8, 15, 16, 17, 31, 33, 48, 100, 1023, 1024, 1025, 1041])
ROUND_DEPTHS = st.sampled_from([1, 3, 4, 7, 8, 9, 255, 256, 257, 383, 384, 385, 770])
needs_own = pytest.mark.skipif(not own_product.available(), reason="own_without_avx2")


def own_product_of(form: Any, left: Any, right: Any) -> Any:
    """left @ right in float32, with each factor handed over as `form` says."""
    a, b = (
        np.ascontiguousarray(factor.T if letter == "t" else factor)
        for factor, letter in zip((left, right), form, strict=True)
    )
    c = np.full((len(left), right.shape[1]), np.nan, np.float32)
    product(own(), form, a, b, c)()
    return c


@needs_own
@pytest.mark.parametrize("form", FORMS)
@quick(20)
@given(SEEDS, ROUND_BLOCKS, ROUND_PANELS, ROUND_DEPTHS)
@example(0, 121, 1025, 385)
@example(0, 250, 17, 770)
@example(0, 120, 16, 384)
def test_our_product_of_any_size_is_the_definitions(
    form: str, seed: int, m: int, n: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n)))
    c = own_product_of(form, left, right)
    expected = left.astype(np.float64) @ right.astype(np.float64)
    bound = (k + 3) * np.finfo(np.float32).eps * (abs(left).astype(np.float64) @ abs(right))
    assert (abs(c - expected) <= bound).all()


@needs_own
@quick(20)
@given(SEEDS, ROUND_BLOCKS, ROUND_PANELS, ROUND_DEPTHS, st.data())
def test_bits_of_our_product_depend_on_the_inputs_alone(
    seed: int, m: int, n: int, k: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n)))
    whole = own_product_of("nt", left, right)
    rows, columns = (
        slice(first, data.draw(st.integers(first + 1, size)))
        for size in (m, n)
        for first in [data.draw(st.integers(0, size - 1))]
    )
    for form in FORMS:
        part = own_product_of(form, left[rows], right[:, columns])
        np.testing.assert_array_equal(part, whole[rows, columns])


@needs_own
@pytest.mark.parametrize("form", FORMS)
def test_our_product_shows_every_number_that_is_not_finite(form: str) -> None:
    left, right = np.ones((7, 5), np.float32), np.ones((5, 19), np.float32)
    left[3, 2], right[4, 17] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(own_product_of(form, left, right), left @ right)


OTHER_TILE = """
import sys
from importlib import reload
import pytest
from mhmoe_np.operations.numba_cpu import float_tile, instruction_set, own_product

before, found = float_tile.LANES, instruction_set.features() ^ {"avx512f"}
instruction_set.features = lambda: found
reload(float_tile)
reload(own_product)
assert {before, float_tile.LANES} == {8, 16}
sys.exit(pytest.main(sys.argv[1:]))
"""


@needs_own
def test_the_tile_for_other_registers_computes_the_same(tmp_path: Path) -> None:
    """That of AVX-512 runs here in two halves, or that of AVX2 in half a register."""
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-k", "our_product")
    done = subprocess.run(
        [sys.executable, "-c", OTHER_TILE, *options, str(Path(__file__).relative_to(ROOT))],
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), VARIABLE: "openblas"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
