"""Every operation once, large enough for all its parallel tasks: all arrays returned or written.

Each function runs the operations of one file; `run_table` runs all of them. `run_beside` runs what the
cuda backend does not have: weights in bfloat16 and in 8-bit integers, and joined steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations.bfloat16 import to_bfloat16
from mhmoe_np.operations.int8 import to_int8
from mhmoe_np.operations.table import AttentionBranch, FeedForwardBranch, Operations
from tests.operations.cases import (
    ADAMW,
    EPS,
    Inputs,
    copies,
    flat,
    heads,
    packed_weight,
    quantise,
    router_losses,
    router_sums,
)

MEMORY = {
    "empty",
    "zeros",
    "empty_packed",
    "scope",
    "buffer_bytes",
    "blas",
    "device",
    "repeated",
    "joined_step",
    "to_device",
    "to_host",
    "packed_to_device",
    "packed_to_host",
}
TABLE = (
    {name for name in vars(Operations) if not name.startswith("_")}
    - MEMORY
    - {"name", "prefers_packed"}
)
N, D, V = 300, 37, 530  # tokens, width, vocabulary
M, E, K = 500, 3, 2  # sub-tokens, experts, choices

Done = dict[str, list[Any]]


def run_table(ops: Operations, dtype: Any, seed: int) -> Done:
    """Everything of the table."""
    done: Done = {}
    for i, run in enumerate(RUNS):
        done |= run(ops, Inputs(seed + i, dtype))
    return done


def run_beside(ops: Operations, dtype: Any, seed: int) -> Done:
    """What is on CPUs alone."""
    r, U, F = Inputs(seed, dtype), 43, 61  # products in 8 bits are parallel from larger sizes on
    x, single = r(N, D), np.float32
    weights = [to_bfloat16(r(V, D).astype(single)), to_int8(r(1, V, D).astype(single))]
    stacks = [to_int8(r(*shape).astype(single)) for shape in ((E, 2 * F, U), (E, U, F))]
    routed = r.routed(M, U, E, K, "even", 300)
    # Squared ReLU: see `experts`.
    y, cache = ops.expert_ffn(*routed, *stacks, None, activation="relu2", eps=EPS)

    B, S, A, G, C, stream = 3, 90, 4, 2, 6, r(3, D)
    kv = r(B, S, 2 * G, C)
    attention = AttentionBranch(r(D), r((A + 2 * G) * C, D), r(A * C), r(D, A * C), kv)
    feed_forward = FeedForwardBranch(r(D), r(2 * F, D), r(F), r(D, F))
    step = ops.joined_step([attention, feed_forward], activation="silu", eps=EPS)
    assert step is not None
    step(stream, r(S, C // 2), r(S, C // 2), np.array([70]))
    return {
        "linear": [ops.linear(x, w, None) for w in weights],
        "expert_ffn": [y, cache.gate_up_R2F],
        "joined_step": [stream, kv],
    }


def sums(ops: Operations, r: Inputs) -> Done:
    onto, total = r(N, D), np.ones(1)
    ops.add_in_place(r(N, D), onto)
    ops.add_sum(r(N), total)
    return {"add_in_place": [onto], "add_sum": [total]}


def linear(ops: Operations, r: Inputs) -> Done:
    x, w, b, dy = r(N, D), r(V, D), r(V), r(N, V)
    bits = r.bits("ternary-2bit", V, D)
    packed = packed_weight(bits, "ternary-2bit")
    forwards = [ops.linear(x, each, b) for each in (w, bits, packed, bits._replace(packed=packed.w))]
    backwards = []
    for each in (w, bits):
        dw, db = r(V, D), r(V)
        backwards += [ops.linear_backward(dy, x, each, dw, db), dw, db]
    id_N, dembedding = r.rng.integers(0, V, N), r(V, D)
    ops.embedding_backward(x, id_N, dembedding)
    return {
        "linear": forwards,
        "linear_backward": backwards,
        "embedding": [ops.embedding(id_N, w)],
        "embedding_backward": [dembedding],
    }


def quantisers(ops: Operations, r: Inputs) -> Done:
    bits = r.bits("ternary-2bit", 1, V, D)
    room = packed_weight(bits, "ternary-2bit").w
    room.code[...] = 255
    ops.pack_in_place(bits.w, room)
    return {
        "quantise_rows": flat(ops.quantise_rows(r(N, D))),
        "quantise_weight": flat(quantise(ops, r(V, 70), (0, 1, 200, V), "bitnet_b158")),
        "pack_in_place": [room.code],
    }


def norm(ops: Operations, r: Inputs) -> Done:
    x, w, dw, dy, branch = r(N, D), r(D), r(D), r(N, D), r(N, D)
    y, rstd = ops.rms_norm(x, w, eps=EPS)
    backwards = [
        ops.rms_norm_backward(dy, x, w, rstd, dw),
        ops.rms_norm_backward(dy, x, w, rstd, dw, onto_ND=r(N, D)),
        dw,
    ]
    return {
        "rms_norm": [y, rstd],
        "rms_norm_backward": backwards,
        "add_in_place_and_norm": [branch, *ops.add_in_place_and_norm(x, branch, w, eps=EPS)],
    }


def attention(ops: Operations, r: Inputs) -> Done:
    B, T, A, G, C = 2, 90, 4, 2, 6
    turned = r(B, T, A, C)
    ops.rotate_in_place(turned, r(T + 3, C // 2), r(T + 3, C // 2), np.array([2]))
    q, k, v = r.joint(B, T, A, G, C)
    out, log_sum_exp = ops.attention(q, k, v)
    q_step, k_past, v_past = r.joint(3, 701, 24, 12, 8)
    step = ops.attention(q_step[:, -1:], k_past, v_past)
    cached = ops.attention_with_cache(*r.joint(B, 3, A, G, C), r(B, T, 2 * G, C), np.array([70]))
    dqkv = r(B, T, A + 2 * G, C)
    ops.attention_backward(r(B, T, A, C), q, k, v, out, log_sum_exp, *heads(dqkv, A, G))
    return {
        "rotate_in_place": [turned],
        "attention": [out, log_sum_exp, *step],
        "attention_with_cache": [cached],
        "attention_backward": [dqkv],
    }


def feed_forward(ops: Operations, r: Inputs) -> Done:
    gate_up, dh = r(N, 2 * D), r(N, D)
    return {
        "gated_activation": [ops.gated_activation(gate_up, activation="silu")],
        "gated_activation_backward": [ops.gated_activation_backward(dh, gate_up, activation="silu")],
    }


def router(ops: Operations, r: Inputs) -> Done:
    counted, totals = r.rng.random(M) < 0.7, router_sums(E)
    routing = ops.route(r(M, E), top_k=K, normalise=True)
    sent = ops.dispatch(routing.expert_MK, experts=E, capacity=300)
    ops.add_router_statistics(routing, sent, counted, totals)
    losses = router_losses(r, E, counted)
    return {
        "route": list(routing),
        "route_backward": [ops.route_backward(r(M, K), routing, counted, losses, normalise=True)],
        "dispatch": list(sent),
        "add_router_statistics": list(totals),
    }


def experts(ops: Operations, r: Inputs) -> Done:
    U, F = 19, 23
    given = (*r.routed(M, U, E, K, "even", 300), r(E, 2 * F, U), r(E, U, F), r(E, F))
    y, cache = ops.expert_ffn(*given, activation="silu", eps=EPS)
    sums = [r(E, 2 * F, U), r(E, U, F), r(E, F)]
    gradients = ops.expert_ffn_backward(r(M, U), *given, cache, *sums, activation="silu")

    # Between the two maps nothing rounds differently on the two backends: squared ReLU multiplies
    # alone, and there is no sub-norm. So no quantiser can see other bits and round to a neighbour.
    U, F = 43, 61  # packed products are parallel from larger sizes on
    routed = r.routed(M, U, E, K, "even", 300)
    stacks = [r.bits("ternary-2bit", E, 2 * F, U), r.bits("ternary-2bit", E, U, F)]
    packs = [packed_weight(stack, "ternary-base3") for stack in stacks]
    both = [stack._replace(packed=pack.w) for stack, pack in zip(stacks, packs, strict=True)]
    outputs = [
        ops.expert_ffn(*routed, *weights, None, activation="relu2", eps=EPS)
        for weights in (stacks, packs, both)
    ]
    bit_cache, bit_sums = outputs[0][1], [r(E, 2 * F, U), r(E, U, F)]
    bit_gradients = ops.expert_ffn_backward(
        r(M, U), *routed, *stacks, None, bit_cache, *bit_sums, None, activation="relu2"
    )
    return {
        "expert_ffn": [y, *flat(cache), bit_cache.gate_up_R2F, *(output for output, _ in outputs)],
        "expert_ffn_backward": [*gradients, *sums, *bit_gradients, *bit_sums],
    }


def loss(ops: Operations, r: Inputs) -> Done:
    x, w, dw, target = r(N, D), r(V, D), r(V, D), r.rng.integers(0, V, N)
    target[::5] = -100
    return {
        "token_nll": [ops.token_nll(x, w, target)],
        "token_nll_and_gradient": [*ops.token_nll_and_gradient(x, w, target, dw, dnll=0.3), dw],
    }


def optimiser(ops: Operations, r: Inputs) -> Done:
    P = 70_000
    squares, state = np.ones(1), [r(P), r(P), r(P), r(P) ** 2]
    ops.add_sum_of_squares(state[1], squares)
    updated, left_out = copies(state), np.zeros(1)
    ops.adamw_in_place(*updated, squares, np.zeros(3), left_out, ADAMW.update(3))
    return {"add_sum_of_squares": [squares], "adamw_in_place": [*updated, left_out]}


RUNS = (
    *(sums, linear, quantisers, norm, attention, feed_forward),
    *(router, experts, loss, optimiser),
)
