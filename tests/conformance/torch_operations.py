"""The operations in PyTorch, and how each is run on the conformance vectors, with autograd.

Written from the equations of the index. A function takes the arguments and options, and returns
results by name, and those that only an upstream gradient speaks of (`aux`, `z`, the sum `nll`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.conformance.torch_port import BitLinear

Given = dict[str, Tensor]
Options = dict[str, Any]


def add_in_place(t: Given, options: Options) -> Given:
    return {"onto_ND.after": t["x_ND"] + t["onto_ND"]}


def add_sum(t: Given, options: Options) -> Given:
    return {"total_1.after": t["total_1"] + t["x_N"].double().sum()}


def linear(t: Given, options: Options) -> Given:
    if "quantization" not in options:
        return {"y_NO": functional.linear(t["x_NI"], t["w_OI"], t.get("b_O"))}
    matrices = t["w_OI"].split(options["matrix_rows"])
    y = [bit_linear(t["x_NI"], matrix, options["quantization"]) for matrix in matrices]
    return {"y_NO": torch.cat(y, dim=1)}


def bit_linear(x: Tensor, w: Tensor, quantization: str) -> Tensor:
    layer = BitLinear(w.shape[1], w.shape[0], quantization=quantization)
    return torch.func.functional_call(layer, {"weight": w}, (x,))


def embedding(t: Given, options: Options) -> Given:
    return {"x_ND": functional.embedding(t["id_N"], t["w_VD"])}


def quantise_rows(t: Given, options: Options) -> Given:
    gamma = t["x_NI"].abs().amax(dim=1).clamp(min=1e-5)
    return {"q_NI": torch.round(t["x_NI"] * (127 / gamma)[:, None]), "scale_N": gamma / 127}


def quantise_weight(t: Given, options: Options) -> Given:
    q, beta = [], []
    for first, last in pairwise(options["starts"]):
        w = t["w_OI"][first:last]
        scale = w.abs().mean().clamp(min=1e-5)
        ternary = options["quantization"] == "bitnet_b158"
        above = torch.where(w > w.mean(), 1.0, -1.0).to(w.dtype)
        q.append(torch.round(w / scale).clamp(-1, 1) if ternary else above)
        beta.append(scale.expand(last - first))
    return {"q_OI": torch.cat(q), "beta_O": torch.cat(beta)}


def rms_norm(t: Given, options: Options) -> Given:
    x, results = t["x_ND"], {}
    if "branch_ND" in t:
        x = results["branch_ND.after"] = x + t["branch_ND"]
    rstd = torch.rsqrt(x.square().mean(dim=1) + options["eps"])
    return {**results, "y_ND": x * rstd[:, None] * t["w_D"], "rstd_N": rstd}


def rotate(t: Given, options: Options) -> Given:
    x = t["x_BTAC"]
    T, J = x.shape[1], x.shape[3] // 2
    position = torch.arange(T, dtype=torch.float64) + t["first_1"]
    angle = position[:, None] * options["rope_theta"] ** (-torch.arange(J, dtype=torch.float64) / J)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex(x, x).dtype)
    turned = torch.complex(x[..., :J], x[..., J:]) * turn[:, None]
    return {"x_BTAC.after": torch.cat([turned.real, turned.imag], dim=-1)}


def attention(t: Given, options: Options) -> Given:
    q, k, v = t["q_BTAC"], t["k_BSGC"], t["v_BSGC"]
    group = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
    T, S = q.shape[1], k.shape[1]
    scores = torch.einsum("btac,bsac->bats", q, k) / math.sqrt(q.shape[3])
    later = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    scores = scores.masked_fill(later, -math.inf)
    out = torch.einsum("bats,bsac->btac", scores.softmax(dim=-1), v)
    return {"out_BTAC": out, "log_sum_exp_BAT": scores.logsumexp(dim=-1)}


def attention_with_cache(t: Given, options: Options) -> Given:
    first, T = int(t["filled_1"]), t["k_BTGC"].shape[1]
    kv = t["kv_BS2GC"].clone()
    kv[:, first : first + T] = torch.cat([t["k_BTGC"], t["v_BTGC"]], dim=2)
    k, v = kv[:, : first + T].chunk(2, dim=2)
    out = attention({"q_BTAC": t["q_BTAC"], "k_BSGC": k, "v_BSGC": v}, options)["out_BTAC"]
    return {"out_BTAC": out, "kv_BS2GC.after": kv}


def gated_activation(t: Given, options: Options) -> Given:
    gate, up = t["gate_up_N2F"].chunk(2, dim=1)
    return {"h_NF": activated(gate, options) * up}


def activated(gate: Tensor, options: Options) -> Tensor:
    silu = options["activation"] == "silu"
    return functional.silu(gate) if silu else functional.relu(gate).square()


def route(t: Given, options: Options) -> Given:
    logits, counted = t["logits_ME"], t.get("counted_M")
    p = logits.softmax(dim=1)
    expert = torch.sort(p.detach(), dim=1, descending=True, stable=True).indices[:, : options["top_k"]]
    gate = p.gather(1, expert)
    if options["normalise"]:
        gate = gate / gate.sum(dim=1, keepdim=True)
    results = {
        "p_ME": p,
        "log_sum_exp_M": logits.logsumexp(dim=1),
        "expert_MK": expert,
        "gate_MK": gate,
    }
    if "count_E" in t:
        share = t["count_E"].to(p.dtype) / t["count_E"].sum()
        results["aux"] = p.shape[1] * (share * p[counted].mean(dim=0)).sum()
        results["z"] = results["log_sum_exp_M"][counted].square().mean()
    return results


def router_statistics(t: Given, options: Options) -> Given:
    routing, counted = route(t, options), t["counted_M"]
    p, expert = routing["p_ME"], routing["expert_MK"]
    E = p.shape[1]
    slot = dispatch({"expert_MK": expert}, {**options, "experts": E})["slot_MK"]
    expert, slot = expert[counted], slot[counted]

    def count(chosen: Tensor) -> Tensor:
        return torch.bincount(chosen.reshape(-1), minlength=E).to(p.dtype)

    return {
        "first_choice_E": count(expert[:, 0]),
        "choice_E": count(expert),
        "p_E": p[counted].sum(dim=0),
        "dropped_E": count(expert[slot < 0]),
        "squared_log_sum_exp_1": routing["log_sum_exp_M"][counted].square().sum()[None],
    }


def dispatch(t: Given, options: Options) -> Given:
    expert, capacity = t["expert_MK"], options["capacity"]
    M, K = expert.shape
    queues: list[list[int]] = [[] for _ in range(options["experts"])]
    for j in range(K):
        for s in range(M):
            queue = queues[int(expert[s, j])]
            if capacity is None or len(queue) < capacity:
                queue.append(s * K + j)
    routed = torch.tensor([choice for queue in queues for choice in queue])
    slot = torch.full((M * K,), -1)
    slot[routed] = torch.arange(len(routed))
    start = torch.tensor([0, *(len(queue) for queue in queues)]).cumsum(dim=0)
    return {"route_R": routed, "slot_MK": slot.reshape(M, K), "start_Z": start}


def expert_ffn(t: Given, options: Options) -> Given:
    x, gate = t["x_MU"], t["gate_MK"]
    E, K = len(t["down_EUF"]), gate.shape[1]
    found = dispatch({"expert_MK": t["expert_MK"]}, {**options, "experts": E})
    y = torch.zeros_like(x)
    for e, (first, last) in enumerate(found["start_Z"].unfold(0, 2, 1).tolist()):
        choice = found["route_R"][first:last]
        if len(choice):
            output = one_expert(x[choice // K], t, e, options)
            y = y.index_add(0, choice // K, gate.reshape(-1, 1)[choice] * output)
    return {"y_MU": y}


def one_expert(x: Tensor, t: Given, e: int, options: Options) -> Tensor:
    def product(x: Tensor, w: Tensor) -> Tensor:
        quantization = options.get("quantization")
        return x @ w.T if quantization is None else bit_linear(x, w, quantization)

    gate, up = t["gate_up_E2FU"][e].chunk(2)
    h = activated(product(x, gate), options) * product(x, up)
    if "sub_norm_EF" in t:
        h = functional.rms_norm(h, h.shape[-1:], t["sub_norm_EF"][e], options["eps"])
    return product(h, t["down_EUF"][e])


def token_nll(t: Given, options: Options) -> Given:
    logits = t["x_ND"] @ t["w_VD"].T
    nll = functional.cross_entropy(logits, t["target_N"], reduction="none", ignore_index=-100)
    return {"nll_N": nll, "nll": nll.sum()}


def sum_of_squares(t: Given, options: Options) -> Given:
    return {"total_1.after": t["total_1"] + t["x_P"].double().square().sum()}


def adamw(t: Given, options: Options) -> Given:
    squares = t["gradient_P"].double().square().sum()[None]
    after = {name: t[name].clone() for name in t if name.endswith("_P")}
    if t["guard"].isfinite().all():
        p = after["parameter_P"]
        p.grad = t["gradient_P"] * min(1.0, options["clip_norm"] / max(float(squares.sqrt()), 1e-30))
        optimiser = torch.optim.AdamW(
            [p],
            lr=options["learning_rate"],
            betas=(options["beta1"], options["beta2"]),
            eps=options["epsilon"],
            weight_decay=options["weight_decay"],
        )
        optimiser.state[p] = {
            "step": torch.tensor(float(options["step"] - 1)),
            "exp_avg": after["first_moment_P"],
            "exp_avg_sq": after["second_moment_P"],
        }
        optimiser.step()
        after["gradient_P"].zero_()
    results = {f"{name}.after": tensor for name, tensor in after.items()}
    return {**results, "squares_1": squares, "left_out_1": torch.zeros(1, dtype=torch.float64)}


OPERATIONS: dict[str, Callable[[Given, Options], Given]] = {
    function.__name__: function
    for function in (
        *(add_in_place, add_sum, linear, embedding, quantise_rows, quantise_weight, rms_norm, rotate),
        *(attention, attention_with_cache, gated_activation, route, router_statistics, dispatch),
        *(expert_ffn, token_nll, sum_of_squares, adamw),
    )
}


def results_of(name: str, entry: Any, tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """One vector by its name, its entry in the index and its file: results and gradients."""
    roles = {tensor: spec["role"] for tensor, spec in entry["tensors"].items()}
    given, upstream = {}, {}
    for tensor, array in tensors.items():
        value = torch.from_numpy(array)
        if value.dtype == torch.float32:
            value = value.to(dtype)
        if roles[tensor] == "argument":
            given[tensor] = value.requires_grad_(f"d{tensor}" in roles)
        elif roles[tensor] == "upstream gradient":
            upstream[tensor.removeprefix("d")] = value
    results = OPERATIONS[name.partition("/")[0]](given, entry["options"])
    found = {tensor: value for tensor, value in results.items() if tensor in roles}
    if upstream:
        torch.stack([(results[key] * dy).sum() for key, dy in upstream.items()]).sum().backward()
        leaves = [tensor for tensor in given if given[tensor].requires_grad]
        found |= {f"d{tensor}": given[tensor].grad for tensor in leaves}
    return {tensor: value.detach().numpy() for tensor, value in found.items()}
