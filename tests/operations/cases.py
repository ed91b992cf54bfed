"""What the tests of this folder share: the backends, seeded inputs, and when two results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, settings
from hypothesis import strategies as st

from mhmoe_np.audit import operation_checks
from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import FormatName, pack
from mhmoe_np.operations.table import (
    AdamWSettings,
    BitWeight,
    Dispatch,
    Operations,
    PackedWeight,
    RouterLosses,
    RouterSums,
)
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import has_gpu
from tests.libraries import ABSENT


def numba_operations() -> Any:
    """Numba's, or None where the library is not installed: tests that name it cannot run then."""
    return None if "numba" in ABSENT else load_operations("numba")


NUMPY = load_operations("numpy")
NUMBA = numba_operations()
CUDA = on_host(cuda_operations())
CUDA_NAME = "cuda" if has_gpu() else "cuda-emulated"
FAST = ({"numba": NUMBA} if NUMBA else {}) | {CUDA_NAME: CUDA}
BACKENDS = {"numpy": NUMPY, **FAST}
DTYPES = [np.float64, np.float32]
ACTIVATIONS = ["silu", "relu2"]
VALUES = {"ternary-2bit": [-1, 0, 1], "ternary-base3": [-1, 0, 1], "sign-1bit": [-1, 1]}
EPS = 1e-5
ADAMW = AdamWSettings(
    learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.1, clip_norm=1.0
)

of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def _named(backends: dict[str, Operations]) -> list[Any]:
    """The names of backends; what runs on a GPU is marked."""
    marks = {"cuda": pytest.mark.gpu}
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in backends]


of_each_backend = pytest.mark.parametrize("name", _named(BACKENDS))
of_each_fast_backend = pytest.mark.parametrize("name", _named(FAST))


def of_the_device(test: Any) -> Any:
    """A test of the cuda backend alone: marked, where it runs on a GPU."""
    return pytest.mark.gpu(test) if CUDA_NAME == "cuda" else test


of_each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


# ---- drawn examples --------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
TINY = st.integers(1, 6)  # sizes for loops over single numbers
WIDTHS = st.integers(1, 19)
# Around the blocks of 64, 128 and 256 rows, besides what is drawn below them.
EDGES = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257]
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
LOADS = st.sampled_from(["even", "one", "half"])  # see `Inputs.experts`


@st.composite
def choices(draw: Any) -> tuple[int, int]:
    """E experts, K of which are chosen: K = E and E = 1 among them."""
    E = draw(st.integers(1, 9))
    return E, draw(st.one_of(st.just(E), st.integers(1, E)))


ALL_CHOICES = [(1, 1), (2, 1), (2, 2), (5, 2), (7, 7), (130, 3)]


def quick(max_examples: int) -> settings:
    """Drawn examples: the same ones in every run, nothing stored."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


def always(cases: list[dict[str, Any]]) -> Callable[[Any], Any]:
    """Examples that every run tries, beside the drawn ones."""

    def decorate(test: Any) -> Any:
        for case in cases:
            test = example(**case)(test)
        return test

    return decorate


# ---- inputs ----------------------------------------------------------------------------------


class Inputs:
    """Standard normal arrays of one dtype from one seed."""

    def __init__(self, seed: int, dtype: Any) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)

    def __call__(self, *shape: int, spread: float = 1.0) -> Any:
        return (self.rng.standard_normal(shape) * spread).astype(self.dtype)

    def joint(self, B: int, T: int, A: int, G: int, C: int) -> tuple[Any, Any, Any]:
        """q, k and v as the model has them: views of one projection."""
        return heads(self(B, T, A + 2 * G, C), A, G)

    def experts(self, M: int, E: int, K: int, load: str) -> Any:
        """K different experts for each sub-token.

        load: "even"; "one": the same first choice for all; "half": as few experts as K and half of
        them allow, so that the others stay empty.
        """
        score_ME = self.rng.random((M, E))
        if load == "one":
            score_ME[:, E // 2] += 1
        elif load == "half":
            score_ME[:, E - max(K, E // 2) :] += 1
        return np.argsort(-score_ME, axis=1)[:, :K].copy()

    def bits(self, format: FormatName, *shape: int) -> BitWeight:
        """Random integers of a format, and scales."""
        w = self.rng.choice(VALUES[format], shape).astype(self.dtype)
        return BitWeight(w, np.abs(self(*shape[:-1])))

    def routed(
        self, M: int, U: int, E: int, K: int, load: str, capacity: int | None
    ) -> tuple[Any, Any, Dispatch]:
        """x_MU, gate_MK and where each choice goes: what the experts are given beside weights."""
        x_MU, gate_MK = self(M, U), self(M, K)
        expert_MK = self.experts(M, E, K, load)
        return x_MU, gate_MK, NUMPY.dispatch(expert_MK, experts=E, capacity=capacity)


def heads(qkv_BTQC: Any, A: int, G: int) -> tuple[Any, Any, Any]:
    return qkv_BTQC[:, :, :A], qkv_BTQC[:, :, A : A + G], qkv_BTQC[:, :, A + G :]


def packed_weight(bits: BitWeight, format: FormatName) -> PackedWeight:
    """The same integers packed; one matrix is a stack of one."""
    w = bits.w.reshape(-1, *bits.w.shape[-2:])
    return PackedWeight(pack(w, format), bits.beta.reshape(w.shape[:2]))


def router_sums(E: int) -> RouterSums:
    """Zeros."""
    return RouterSums(*(np.zeros(E) for _ in range(4)), np.zeros(1))


def router_losses(r: Inputs, E: int, counted_M: Any) -> RouterLosses:
    """Counts of each expert, and what balance loss and z-loss might send back."""
    count_E = r.rng.integers(0, 9, E).astype(float)
    count_E[0] += 1
    return RouterLosses(count_E, int(count_E.sum()), max(1, int(counted_M.sum())), 0.7, 0.3)


class Quantised(NamedTuple):
    """What `quantise_weight` overwrites."""

    q: Any
    beta: Any
    report: Any


def quantise(
    ops: Operations, w: Any, starts: tuple[int, ...], quantization: Any, before: Any = None
) -> Quantised:
    """`quantise_weight` into new arrays; before: what q holds."""
    found = Quantised(
        np.zeros_like(w) if before is None else before.copy(),
        np.full(len(w), np.nan, w.dtype),
        np.full((len(starts) - 1, 5), np.nan),
    )
    with unchanged(w):
        ops.quantise_weight(
            w,
            starts,
            quantization=quantization,
            q_OI=found.q,
            beta_O=found.beta,
            report_X5=found.report,
        )
    return found


# ---- when two results agree ------------------------------------------------------------------

# Of the size of what is added up, in roundings. A sum of n terms in two orders differs by some
# sqrt(n)/6 roundings of the sum of their sizes: n roundings of random sign, each of a partial sum. (By
# half a rounding, whatever n is, where the terms are alike and of random sign: then partial sums are of
# size sqrt(n) themselves.) n is at most some hundred here; where it is more, a test says so. The worst
# of many entries is some times that; an operation has one or two such sums, and a float32 `exp`, which
# is off by up to two and a half roundings itself. The largest difference found was below 5.
ROUNDINGS = 16


def bound(dtype: Any) -> float:
    """How far two results may be apart, relative to the size of what is added up."""
    return ROUNDINGS * float(np.finfo(dtype).eps)


def flat(result: Any) -> list[Any]:
    """The arrays of a result, however nested; None where an optional one is absent."""
    if isinstance(result, tuple | list):
        return [array for part in result for array in flat(part)]
    return [result]


def agree(actual: Any, expected: Any, *sizes: Any) -> None:
    """Equal integers; floats within `bound` of their size, entry by entry.

    sizes: for each array what its entries' errors are relative to, where that is not the entries
    themselves: where a sum cancels, the sum of the sizes of its terms.
    """
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if e.dtype.kind != "f":
            np.testing.assert_array_equal(a, e)
            continue
        assert np.isfinite(e).all()
        size = np.maximum(np.abs(e), sizes[i] if i < len(sizes) else 0)
        # Below the smallest normal number there are fewer digits, and `exp` may be 0.
        allowed = bound(e.dtype) * size + 4 * np.finfo(e.dtype).tiny
        error = np.abs(a - e)
        worst = np.unravel_index(np.argmax(error / allowed), e.shape) if e.size else ()
        assert (error <= allowed).all(), (
            f"part {i} at {worst}: {a[worst]} and {e[worst]}, allowed {allowed[worst]:.3e}"
        )


def same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(flat(actual), flat(expected), strict=True):
        if e is None:
            assert a is None
            continue
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.tobytes() == e.tobytes()


def near(actual: Any, expected: Any) -> None:
    """float64 against a loop over single numbers: the same few operations in another order.

    Entries are of size one to a hundred.
    """
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=1e-12, atol=1e-12)


def is_the_derivative(case: operation_checks.Case) -> None:
    """Every argument's gradient, by the product's own method."""
    found = operation_checks.check(case, np.random.default_rng(1))
    assert found.passed, found


def copies(arrays: Any) -> list[Any]:
    return [None if array is None else array.copy() for array in arrays]


@contextmanager
def unchanged(*arrays: Any) -> Iterator[None]:
    """The operations inside leave these arrays as they are."""
    before = copies(flat(arrays))
    yield
    same_bits(flat(arrays), before)
