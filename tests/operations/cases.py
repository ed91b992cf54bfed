"""What the tests of this folder share: the two backends, seeded inputs, bounds, one run of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import example, settings
from hypothesis import strategies as st

from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import FormatName, pack
from mhmoe_np.operations.table import (
    AdamWSettings,
    BitWeight,
    Operations,
    PackedWeight,
    RouterLosses,
    RouterSums,
)

NUMPY = load_operations("numpy")
NUMBA = load_operations("numba")
BACKENDS = {"numpy": NUMPY, "numba": NUMBA}
MEMORY = {
    "empty",
    "zeros",
    "empty_packed",
    "scope",
    "buffer_bytes",
    "to_device",
    "to_host",
    "packed_to_device",
    "packed_to_host",
}
TABLE = {name for name in vars(Operations) if not name.startswith("_")} - MEMORY - {"prefers_packed"}
DTYPES = [np.float64, np.float32]
ACTIVATIONS = ["silu", "relu2"]

# float64: reordered sums and fused multiply-adds only, some thousand roundings of 2.2e-16.
# float32: the same at 1.2e-7, where a reordered sum of n terms is off by up to about sqrt(n)/2
# roundings of its typical size, n being at most some thousand here; and `exp` adds up to two.
BOUND = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 64 * 2.0**-23}


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


SEEDS = st.integers(0, 2**32 - 1)


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


def heads(qkv_BTQC: Any, A: int, G: int) -> tuple[Any, Any, Any]:
    return qkv_BTQC[:, :, :A], qkv_BTQC[:, :, A : A + G], qkv_BTQC[:, :, A + G :]


def flat(result: Any) -> list[Any]:
    """The arrays of a result, however nested; None where an optional one is absent."""
    if isinstance(result, tuple | list):
        return [array for part in result for array in flat(part)]
    return [result]


def agree(actual: Any, expected: Any, *, unit: float = 1.0) -> None:
    """Equal integers; floats within BOUND of the largest entry.

    unit: the size of what is summed up, which sets the rounding where the sum itself cancels.
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
        error = np.abs(a - e).max(initial=0.0)
        allowed = BOUND[e.dtype] * max(unit, np.abs(e).max(initial=0.0))
        assert error <= allowed, f"part {i}: off by {error:.3e}, allowed {allowed:.3e}"


def same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(flat(actual), flat(expected), strict=True):
        if e is None:
            assert a is None
            continue
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.tobytes() == e.tobytes()


def packed_weight(bits: BitWeight, format: FormatName) -> PackedWeight:
    """The same integers packed; one matrix is a stack of one."""
    w = bits.w.reshape(-1, *bits.w.shape[-2:])
    return PackedWeight(pack(w, format), bits.beta.reshape(w.shape[:2]))


def copies(arrays: Any) -> list[Any]:
    return [None if array is None else array.copy() for array in arrays]


@contextmanager
def unchanged(*arrays: Any) -> Iterator[None]:
    """The operations inside leave these arrays as they are."""
    before = copies(flat(arrays))
    yield
    same_bits(flat(arrays), before)


ADAMW = AdamWSettings(
    learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.1, clip_norm=1.0
)


def router_sums(E: int) -> RouterSums:
    """Zeros."""
    return RouterSums(*(np.zeros(E) for _ in range(4)), np.zeros(1))


def router_losses(r: Inputs, E: int, counted_M: Any) -> RouterLosses:
    """Counts of each expert, and what balance loss and z-loss might send back."""
    count_E = r.rng.integers(0, 9, E).astype(float)
    count_E[0] += 1
    return RouterLosses(count_E, int(count_E.sum()), max(1, int(counted_M.sum())), 0.7, 0.3)


def run_table(ops: Operations, dtype: Any, seed: int) -> dict[str, list[Any]]:
    """Every operation once, by its parallel kernels: all arrays returned or written."""
    r = Inputs(seed, dtype)
    done: dict[str, list[Any]] = {}
    N, D, V = 300, 37, 530
    x, w, b, dy, dx = r(N, D), r(V, D), r(V), r(N, V), r(N, D)

    done["linear"] = flat(ops.linear(x, w, b))
    dw, db = r(V, D), r(V)
    done["linear_backward"] = [ops.linear_backward(dy, x, w, dw, db), dw, db]

    bits = BitWeight(r.rng.integers(-1, 2, (V, D)).astype(dtype), abs(r(V)))
    packed = packed_weight(bits, "ternary-2bit")
    dw, db = r(V, D), r(V)
    both = bits._replace(packed=packed.w)
    done["linear"] += [ops.linear(x, w, b) for w in (bits, packed, both)]
    done["linear_backward"] += [ops.linear_backward(dy, x, bits, dw, db), dw, db]
    done["quantise_rows"] = flat(ops.quantise_rows(x))
    q, beta = np.zeros((V, 70), dtype), np.zeros(V, dtype)
    report = np.zeros((3, 5))
    ops.quantise_weight(
        r(V, 70),
        (0, 1, 200, V),
        quantization="bitnet_b158",
        q_OI=q,
        beta_O=beta,
        report_X5=report,
    )
    done["quantise_weight"] = [report, q, beta]
    room = packed.w._replace(code=np.empty_like(packed.w.code))
    ops.pack_in_place(bits.w[None], room)
    done["pack_in_place"] = [room.code]

    onto, total = r(N, D), np.ones(1)
    ops.add_in_place(x, onto)
    ops.add_sum(x[:, 0].copy(), total)
    done["add_in_place"], done["add_sum"] = [onto], [total]

    ids, dw = r.rng.integers(0, V, N), r(V, D)
    done["embedding"] = [ops.embedding(ids, w)]
    ops.embedding_backward(x, ids, dw)
    done["embedding_backward"] = [dw]

    norm_w, dnorm_w = r(D), r(D)
    y, rstd = ops.rms_norm(x, norm_w, eps=1e-5)
    done["rms_norm"] = [y, rstd]
    onto = r(N, D)
    done["rms_norm_backward"] = [
        ops.rms_norm_backward(dx, x, norm_w, rstd, dnorm_w),
        ops.rms_norm_backward(dx, x, norm_w, rstd, dnorm_w, onto_ND=onto),
        dnorm_w,
    ]
    branch = r(N, D)
    done["add_in_place_and_norm"] = [branch, *ops.add_in_place_and_norm(x, branch, norm_w, eps=1e-5)]

    B, T, A, G, C = 2, 90, 4, 2, 6
    turned, cos, sin = r(B, T, A, C), r(T, C // 2), r(T, C // 2)
    ops.rotate_in_place(turned, cos, sin)
    done["rotate_in_place"] = [turned]
    q, k, v = r.joint(B, T, A, G, C)
    out, lse = ops.attention(q, k, v)
    done["attention"] = [out, lse]
    q_step, k_past, v_past = r.joint(3, 701, 24, 12, 8)
    done["attention"] += ops.attention(q_step[:, -1:], k_past, v_past)
    dqkv = r(B, T, A + 2 * G, C)
    ops.attention_backward(r(B, T, A, C), q, k, v, out, lse, *heads(dqkv, A, G))
    done["attention_backward"] = [dqkv]

    gate_up = r(N, 2 * D)
    done["gated_activation"] = [ops.gated_activation(gate_up, activation="silu")]
    done["gated_activation_backward"] = [ops.gated_activation_backward(dx, gate_up, activation="silu")]

    M, U, F, E, K = 500, 19, 23, 3, 2
    routing = ops.route(r(M, E), top_k=K, normalise=True)
    done["route"] = list(routing)
    counted = r.rng.random(M) < 0.7
    losses = router_losses(r, E, counted)
    done["route_backward"] = [ops.route_backward(r(M, K), routing, counted, losses, normalise=True)]
    sent = ops.dispatch(routing.expert_MK, experts=E, capacity=300)
    done["dispatch"] = list(sent)
    sums = router_sums(E)
    ops.add_router_statistics(routing, sent, counted, sums)
    done["add_router_statistics"] = list(sums)
    given = (r(M, U), routing.gate_MK, sent, r(E, 2 * F, U), r(E, U, F), r(E, F))
    y, cache = ops.expert_ffn(*given, activation="silu", eps=1e-5)
    done["expert_ffn"] = flat((y, cache))
    dweights = [r(E, 2 * F, U), r(E, U, F), r(E, F)]
    gradients = ops.expert_ffn_backward(r(M, U), *given, cache, *dweights, activation="silu")
    done["expert_ffn_backward"] = [*gradients, *dweights]

    # Between the two maps nothing rounds differently on the two backends: squared ReLU multiplies
    # alone, and there is no sub-norm. So no quantiser can see other bits and round to a neighbour.
    U, F = 43, 61  # packed products are parallel from larger sizes on
    stacks = [
        BitWeight(r.rng.integers(-1, 2, (E, *shape)).astype(dtype), abs(r(E, shape[0])))
        for shape in ((2 * F, U), (U, F))
    ]
    given = (r(M, U), routing.gate_MK, sent)
    y, cache = ops.expert_ffn(*given, *stacks, None, activation="relu2", eps=1e-5)
    done["expert_ffn"] += [y, cache.gate_up_R2F]
    packs = [packed_weight(stack, "ternary-base3") for stack in stacks]
    both = [bits._replace(packed=pack.w) for bits, pack in zip(stacks, packs, strict=True)]
    for weights in (packs, both):
        y, _ = ops.expert_ffn(*given, *weights, None, activation="relu2", eps=1e-5)
        done["expert_ffn"] += [y]
    dweights = [r(E, 2 * F, U), r(E, U, F)]
    gradients = ops.expert_ffn_backward(
        r(M, U), *given, *stacks, None, cache, *dweights, None, activation="relu2"
    )
    done["expert_ffn_backward"] += [*gradients, *dweights]

    target = r.rng.integers(0, V, N)
    target[::5] = -100
    dw = r(V, D)
    done["token_nll"] = [ops.token_nll(x, w, target)]
    done["token_nll_and_gradient"] = [
        *ops.token_nll_and_gradient(x, w, target, dw, dnll=0.3),
        dw,
    ]

    P = 70_000
    state = [r(P), r(P), r(P), r(P) ** 2]
    squares = np.ones(1)
    ops.add_sum_of_squares(state[0], squares)
    done["add_sum_of_squares"] = [squares]
    ops.adamw_in_place(*state, squares, np.zeros(3), step=3, settings=ADAMW)
    done["adamw_in_place"] = state
    return done
