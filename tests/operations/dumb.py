"""The operations once more, slow and naive: loops over single numbers, no array expression.

Written from the contract in `table.py` and not from the definitions, so that the two can disagree.
Floats are Python's; arguments are nested lists or anything that indexes like them.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any


def dispatch(expert_MK: Any, experts: int, capacity: int | None) -> tuple[Any, Any, Any]:
    """Every expert has a queue; all first choices line up, then all second ones."""
    M, K = len(expert_MK), len(expert_MK[0])
    queues: list[deque[tuple[int, int]]] = [deque() for _ in range(experts)]
    for j in range(K):
        for m in range(M):
            queues[expert_MK[m][j]].append((m, j))
    route, start, slot = [], [0], [[-1] * K for _ in range(M)]
    for queue in queues:
        served = 0
        while queue and (capacity is None or served < capacity):
            m, j = queue.popleft()
            slot[m][j] = len(route)
            route.append(m * K + j)
            served += 1
        start.append(len(route))
    return route, slot, start


def softmax(logits: Any) -> list[float]:
    highest = max(logits)
    e = [math.exp(x - highest) for x in logits]
    return [x / math.fsum(e) for x in e]


def log_sum_exp(logits: Any) -> float:
    highest = max(logits)
    return highest + math.log(math.fsum(math.exp(x - highest) for x in logits))


def route(logits_ME: Any, top_k: int, normalise: bool) -> tuple[Any, Any, Any, Any]:
    p_ME, lse_M, expert_MK, gate_MK = [], [], [], []
    for logits in logits_ME:
        p = softmax(logits)
        # Python's sort is stable: of equal ones the lower index stays first.
        chosen = sorted(range(len(p)), key=lambda e, p=p: -p[e])[:top_k]
        total = math.fsum(p[e] for e in chosen) if normalise else 1.0
        p_ME.append(p)
        lse_M.append(log_sum_exp(logits))
        expert_MK.append(chosen)
        gate_MK.append([p[e] / total for e in chosen])
    return p_ME, lse_M, expert_MK, gate_MK


def router_statistics(
    p_ME: Any, lse_M: Any, expert_MK: Any, slot_MK: Any, counted_M: Any
) -> tuple[list[int], list[int], list[float], list[int], float]:
    """First choices, choices, probabilities and drops of each expert; squares of the log-sum-exp."""
    E = len(p_ME[0])
    first, choice, dropped = [0] * E, [0] * E, [0] * E
    p, squares = [0.0] * E, 0.0
    for m, counts in enumerate(counted_M):
        if not counts:
            continue
        first[expert_MK[m][0]] += 1
        for j, e in enumerate(expert_MK[m]):
            choice[e] += 1
            dropped[e] += slot_MK[m][j] < 0
        p = [p[e] + p_ME[m][e] for e in range(E)]
        squares += lse_M[m] ** 2
    return first, choice, p, dropped, squares


def quantise_row(x_I: Any) -> tuple[list[int], float]:
    """Integers and gamma/127; Python rounds halves to even."""
    gamma = max(1e-5, *(abs(x) for x in x_I))
    q = [min(max(round(x * (127 / gamma)), -128), 127) for x in x_I]
    return q, gamma / 127


def quantise_matrix(w_OI: Any, quantization: str) -> tuple[list[list[int]], float]:
    """Integers and beta."""
    numbers = [w for row in w_OI for w in row]
    beta = max(math.fsum(abs(w) for w in numbers) / len(numbers), 1e-5)
    mean = math.fsum(numbers) / len(numbers)

    def one(w: float) -> int:
        if quantization == "bitnet":
            return 1 if w - mean > 0 else -1
        return min(max(round(w * (1 / beta)), -1), 1)

    return [[one(w) for w in row] for row in w_OI], beta


def linear(x_NI: Any, w_OI: Any, b_O: Any) -> list[list[float]]:
    return [[dot(x, w) + (0 if b_O is None else b_O[o]) for o, w in enumerate(w_OI)] for x in x_NI]


def bit_linear(x_NI: Any, w_OI: Any, beta_O: Any) -> list[list[float]]:
    """Integer products, then one scale."""
    y_NO = []
    for x in x_NI:
        q, scale = quantise_row(x)
        sums = [sum(int(a) * int(b) for a, b in zip(q, w, strict=True)) for w in w_OI]
        y_NO.append([total * (beta * scale) for total, beta in zip(sums, beta_O, strict=True)])
    return y_NO


def dot(x: Any, y: Any) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def activate(z: float, activation: str) -> float:
    return z / (1 + math.exp(-z)) if activation == "silu" else max(z, 0.0) * max(z, 0.0)


def gated(row: Any, activation: str) -> list[float]:
    """The first half gates the second."""
    F = len(row) // 2
    return [activate(row[f], activation) * row[F + f] for f in range(F)]


def rms_norm(x_ND: Any, w_D: Any, eps: float) -> tuple[list[list[float]], list[float]]:
    rstd = [1 / math.sqrt(dot(x, x) / len(x) + eps) for x in x_ND]
    y = [[x[d] * rstd[n] * w_D[d] for d in range(len(x))] for n, x in enumerate(x_ND)]
    return y, rstd


def project(x: Any, weight: Any) -> list[float]:
    """One row through a matrix of floats, or through a pair of integers and scales."""
    if isinstance(weight, tuple):
        return bit_linear([x], *weight)[0]
    return [dot(w, x) for w in weight]


def expert(x: Any, gate_up: Any, down: Any, sub_norm: Any, activation: str, eps: float) -> list[float]:
    """One expert on one sub-token."""
    h = gated(project(x, gate_up), activation)
    if sub_norm is not None:
        [h], _ = rms_norm([h], sub_norm, eps)
    return project(h, down)


def expert_ffn(
    x_MU: Any,
    gate_MK: Any,
    expert_MK: Any,
    slot_MK: Any,
    gate_up_E2FU: Any,
    down_EUF: Any,
    sub_norm_EF: Any,
    activation: str,
    eps: float,
) -> list[list[float]]:
    """Sub-token by sub-token, choice by choice; only whether a choice was dropped is looked up."""
    y_MU = []
    for m, x in enumerate(x_MU):
        y = [0.0] * len(x)
        for j, e in enumerate(expert_MK[m]):
            if slot_MK[m][j] < 0:
                continue
            norm = None if sub_norm_EF is None else sub_norm_EF[e]
            out = expert(x, gate_up_E2FU[e], down_EUF[e], norm, activation, eps)
            y = [a + gate_MK[m][j] * b for a, b in zip(y, out, strict=True)]
        y_MU.append(y)
    return y_MU


def attention(q_BTAC: Any, k_BSGC: Any, v_BSGC: Any) -> tuple[Any, Any]:
    """Query by query: the scores of the keys it sees, their softmax, the mean of the values."""
    T, A = len(q_BTAC[0]), len(q_BTAC[0][0])
    S, G, C = len(k_BSGC[0]), len(k_BSGC[0][0]), len(k_BSGC[0][0][0])
    out_BTAC, lse_BAT = [], []
    for q, k, v in zip(q_BTAC, k_BSGC, v_BSGC, strict=True):
        out = [[[0.0] * C for _ in range(A)] for _ in range(T)]
        lse = [[0.0] * T for _ in range(A)]
        for a in range(A):
            g = a // (A // G)
            for t in range(T):
                seen = range(S - T + t + 1)
                scores = [dot(q[t][a], k[s][g]) / math.sqrt(C) for s in seen]
                p = softmax(scores)
                out[t][a] = [math.fsum(p[s] * v[s][g][c] for s in seen) for c in range(C)]
                lse[a][t] = log_sum_exp(scores)
        out_BTAC.append(out)
        lse_BAT.append(lse)
    return out_BTAC, lse_BAT


def rotate(x_BTAC: Any, cos_TJ: Any, sin_TJ: Any) -> list[Any]:
    """Each pair is a complex number, turned by one complex product."""

    def turned(head: Any, cos: Any, sin: Any) -> list[float]:
        J = len(cos)
        z = [complex(head[j], head[j + J]) * complex(cos[j], sin[j]) for j in range(J)]
        return [c.real for c in z] + [c.imag for c in z]

    return [
        [[turned(head, cos_TJ[t], sin_TJ[t]) for head in x[t]] for t in range(len(x))] for x in x_BTAC
    ]


def token_nll(x_ND: Any, w_VD: Any, target_N: Any) -> list[float]:
    nll = []
    for x, target in zip(x_ND, target_N, strict=True):
        logits = [dot(x, w) for w in w_VD]
        nll.append(log_sum_exp(logits) - logits[target] if target >= 0 else 0.0)
    return nll


def embedding_backward(dx_ND: Any, id_N: Any, dw_VD: Any) -> list[list[float]]:
    dw = [list(row) for row in dw_VD]
    for dx, i in zip(dx_ND, id_N, strict=True):
        for d, value in enumerate(dx):
            dw[i][d] += value
    return dw


def adamw(
    parameter: float,
    gradient: float,
    first: float,
    second: float,
    squares: float,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    clip_norm: float,
) -> tuple[float, float, float]:
    """One parameter's update: its new value and moments."""
    norm = math.sqrt(squares)
    g = gradient * clip_norm / norm if norm > clip_norm else gradient
    first = beta1 * first + (1 - beta1) * g
    second = beta2 * second + (1 - beta2) * g * g
    mean, variance = first / (1 - beta1**step), second / (1 - beta2**step)
    move = decay * parameter + mean / (math.sqrt(variance) + epsilon)
    return parameter - learning_rate * move, first, second
