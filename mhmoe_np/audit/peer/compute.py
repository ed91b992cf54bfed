"""What PyTorch and Hugging Face make of the table's operations.

    python compute.py FOLDER PEER...

Run by `audit.peers` in a process of its own. FOLDER/PEER has `calls.json` and the operands of call i in
`i.npz`, by the table's names; the results go into `i.out.npz`, by the same names, and at the end the
peer's `version`. Calls of forms that the peer does not have are left out. Gradients are autograd's.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
Numbers = dict[str, Any]
Forward = Callable[[Tensors, Numbers], Tensors]


def gradients(
    forward: Forward, a: Tensors, numbers: Numbers, names: list[str], **upstream: str
) -> Tensors:
    """Autograd's gradients of the arguments in `names`, added to what stands in their arrays.

    upstream: for each output of the forward the argument that is its gradient.
    """
    leaves = {name: a[name].clone().requires_grad_() for name in names}
    outputs = forward(a | leaves, numbers)
    found = torch.autograd.grad(
        [outputs[output] for output in upstream],
        list(leaves.values()),
        [a[gradient] for gradient in upstream.values()],
    )
    return {f"d{name}": a.get(f"d{name}", 0) + g for name, g in zip(names, found, strict=True)}


# ---- PyTorch -------------------------------------------------------------------------------------


def linear(a: Tensors, _: Numbers) -> Tensors:
    return {"y_NO": functional.linear(a["x_NI"], a["w_OI"], a["b_O"])}


def linear_backward(a: Tensors, n: Numbers) -> Tensors:
    with_bias = a | {"b_O": torch.zeros_like(a["db_O"])}
    return gradients(linear, with_bias, n, ["x_NI", "w_OI", "b_O"], y_NO="dy_NO")


def embedding(a: Tensors, _: Numbers) -> Tensors:
    return {"x_ND": functional.embedding(a["id_N"], a["w_VD"])}


def embedding_backward(a: Tensors, n: Numbers) -> Tensors:
    return gradients(embedding, a | {"w_VD": torch.zeros_like(a["dw_VD"])}, n, ["w_VD"], x_ND="dx_ND")


def rms_norm(a: Tensors, n: Numbers) -> Tensors:
    return {"y_ND": functional.rms_norm(a["x_ND"], a["w_D"].shape, a["w_D"], n["eps"])}


def rms_norm_backward(a: Tensors, n: Numbers) -> Tensors:
    return gradients(rms_norm, a, n, ["x_ND", "w_D"], y_ND="dy_ND")


def add_in_place_and_norm(a: Tensors, n: Numbers) -> Tensors:
    branch = a["branch_ND"] + a["x_ND"]
    return {"branch_ND": branch, **rms_norm({"x_ND": branch, "w_D": a["w_D"]}, n)}


def rotate_in_place(a: Tensors, _: Numbers) -> Tensors:
    """A pair as a complex number, times the number of its angle."""
    x, first = a["x_BTAC"], int(a["first_1"])
    J, rows = x.shape[3] // 2, slice(first, first + x.shape[1])
    turn = torch.complex(a["cos_YJ"][rows], a["sin_YJ"][rows])[:, None]
    turned = torch.complex(x[..., :J], x[..., J:]) * turn
    return {"x_BTAC": torch.cat([turned.real, turned.imag], dim=3)}


def attention(a: Tensors, _: Numbers) -> Tensors:
    q, k, v = (a[name].transpose(1, 2) for name in ("q_BTAC", "k_BSGC", "v_BSGC"))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return {"out_BTAC": out.transpose(1, 2).contiguous()}


def attention_backward(a: Tensors, n: Numbers, forward: Forward = attention) -> Tensors:
    def of_same_lengths(given: Tensors, numbers: Numbers) -> Tensors:
        return forward(given | {"k_BSGC": given["k_BTGC"], "v_BSGC": given["v_BTGC"]}, numbers)

    return gradients(of_same_lengths, a, n, ["q_BTAC", "k_BTGC", "v_BTGC"], out_BTAC="dout_BTAC")


def activate(x: Tensor, activation: str) -> Tensor:
    return functional.silu(x) if activation == "silu" else functional.relu(x).square()


def gated_activation(a: Tensors, n: Numbers) -> Tensors:
    gate, up = a["gate_up_N2F"].chunk(2, dim=1)
    return {"h_NF": activate(gate, n["activation"]) * up}


def gated_activation_backward(a: Tensors, n: Numbers) -> Tensors:
    return gradients(gated_activation, a, n, ["gate_up_N2F"], h_NF="dh_NF")


def route(a: Tensors, n: Numbers) -> Tensors:
    p = functional.softmax(a["logits_ME"], dim=1)
    gate, expert = p.topk(n["top_k"], dim=1)
    if n["normalise"]:
        gate = gate / gate.sum(dim=1, keepdim=True)
    lse = a["logits_ME"].logsumexp(dim=1)
    return {"p_ME": p, "log_sum_exp_M": lse, "expert_MK": expert, "gate_MK": gate}


def route_backward(a: Tensors, n: Numbers) -> Tensors:
    """Of the gates' part of the loss, and of what it has of the balance loss and the z-loss."""
    p, lse = a["routing.p_ME"], a["routing.log_sum_exp_M"]
    share_E, counted = a["losses.count_E"] / n["losses.choices"], a["counted_M"]

    def loss(given: Tensors, numbers: Numbers) -> Tensors:
        routing = route(given, numbers | {"top_k": a["dgate_MK"].shape[1]})
        mean_p_E = routing["p_ME"][counted].sum(dim=0) / n["losses.sub_tokens"]
        aux = len(share_E) * (share_E * mean_p_E).sum()
        z = routing["log_sum_exp_M"][counted].square().sum() / n["losses.sub_tokens"]
        task = (a["dgate_MK"] * routing["gate_MK"]).sum()
        return {"loss": task + n["losses.daux"] * aux + n["losses.dz"] * z}

    given = {"logits_ME": p.log() + lse[:, None], "one": torch.ones((), dtype=p.dtype)}
    return gradients(loss, given, n, ["logits_ME"], loss="one")


def experts_of(a: Tensors) -> Tensor:
    """Which expert each choice went to; -1: dropped."""
    slot, start = a["dispatch.slot_MK"], a["dispatch.start_Z"]
    return torch.where(slot < 0, -1, torch.searchsorted(start, slot, right=True) - 1)


def expert_ffn(a: Tensors, n: Numbers) -> Tensors:
    expert_MK, y = experts_of(a), torch.zeros_like(a["x_MU"])
    for e in range(len(a["gate_up_E2FU"])):
        for k in range(expert_MK.shape[1]):
            rows = (expert_MK[:, k] == e).nonzero()[:, 0]
            gate, up = functional.linear(a["x_MU"][rows], a["gate_up_E2FU"][e]).chunk(2, dim=1)
            h = activate(gate, n["activation"]) * up
            if "sub_norm_EF" in a:
                h = functional.rms_norm(h, h.shape[1:], a["sub_norm_EF"][e], n["eps"])
            out = functional.linear(h, a["down_EUF"][e])
            y = y.index_add(0, rows, a["gate_MK"][rows, k, None] * out)
    return {"y_MU": y}


def expert_ffn_backward(a: Tensors, n: Numbers, forward: Forward = expert_ffn) -> Tensors:
    weights = [name for name in ("gate_up_E2FU", "down_EUF", "sub_norm_EF") if name in a]
    return gradients(forward, a, n, ["x_MU", "gate_MK", *weights], y_MU="dy_MU")


def token_nll(a: Tensors, _: Numbers) -> Tensors:
    logits = functional.linear(a["x_ND"], a["w_VD"])
    return {"nll_N": functional.cross_entropy(logits, a["target_N"], reduction="none")}


def token_nll_and_gradient(a: Tensors, n: Numbers) -> Tensors:
    nll = token_nll(a, n)
    upstream = {"dnll_N": torch.full_like(nll["nll_N"], n["dnll"])}
    return nll | gradients(token_nll, a | upstream, n, ["x_ND", "w_VD"], nll_N="dnll_N")


def adamw_in_place(a: Tensors, _: Numbers) -> Tensors:
    """PyTorch's optimiser; it counts steps, of which both corrections are powers.

    The clipping is written out, for `clip_grad_norm_` adds 1e-6 to the norm.
    """
    rate, beta1, beta2, eps, decay, clip, correction, _ = a["update_8"].tolist()
    step = round(float(np.log1p(-correction) / np.log(beta1))) - 1
    parameter = torch.nn.Parameter(a["parameter_P"].clone())
    parameter.grad = a["gradient_P"] * min(1.0, clip / float(a["gradient_P"].norm()))
    optimiser = torch.optim.AdamW([parameter], rate, (beta1, beta2), eps, decay)
    moments = {"exp_avg": a["first_moment_P"].clone(), "exp_avg_sq": a["second_moment_P"].clone()}
    optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    optimiser.step()
    return {
        "parameter_P": parameter,
        "first_moment_P": moments["exp_avg"],
        "second_moment_P": moments["exp_avg_sq"],
    }


TORCH = {
    function.__name__: function
    for function in (
        *(linear, linear_backward, embedding, embedding_backward),
        *(rms_norm, rms_norm_backward, add_in_place_and_norm, rotate_in_place),
        *(attention, attention_backward, gated_activation, gated_activation_backward),
        *(route, route_backward, expert_ffn, expert_ffn_backward),
        *(token_nll, token_nll_and_gradient, adamw_in_place),
    )
}


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face() -> dict[str, Callable[[Tensors, Numbers], Tensors | None]]:
    """Llama's norm, rotation and attention; Mixtral's router and experts."""
    from transformers.models.llama.modeling_llama import (
        LlamaRMSNorm,
        apply_rotary_pos_emb,
        eager_attention_forward,
    )
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

    def hf_rms_norm(a: Tensors, n: Numbers) -> Tensors:
        norm = LlamaRMSNorm(len(a["w_D"]), n["eps"])
        return {"y_ND": torch.func.functional_call(norm, {"weight": a["w_D"]}, a["x_ND"])}

    def hf_rotate(a: Tensors, _: Numbers) -> Tensors:
        x, first = a["x_BTAC"], int(a["first_1"])
        rows = slice(first, first + x.shape[1])
        cos, sin = (torch.cat([a[name][rows]] * 2, dim=1)[None] for name in ("cos_YJ", "sin_YJ"))
        return {"x_BTAC": apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]}

    def hf_attention(a: Tensors, _: Numbers) -> Tensors:
        q, k, v = (a[name].transpose(1, 2) for name in ("q_BTAC", "k_BSGC", "v_BSGC"))
        T, C = q.shape[2:]
        later = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        layer: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        return {"out_BTAC": eager_attention_forward(layer, q, k, v, later, C**-0.5)[0]}

    def hf_route(a: Tensors, n: Numbers) -> Tensors | None:
        """Its router divides the gates by their sum; given the logits, its weights are the identity."""
        if not n["normalise"]:
            return None
        E = a["logits_ME"].shape[1]
        config: Any = SimpleNamespace(
            num_experts_per_tok=n["top_k"], num_local_experts=E, hidden_size=E
        )
        weight = {"weight": torch.eye(E, dtype=a["logits_ME"].dtype)}
        _, gate, expert = torch.func.functional_call(MixtralTopKRouter(config), weight, a["logits_ME"])
        return {"expert_MK": expert, "gate_MK": gate}

    def hf_experts(a: Tensors, n: Numbers) -> Tensors:
        E, U, F = a["down_EUF"].shape
        config: Any = SimpleNamespace(
            num_local_experts=E,
            hidden_size=U,
            intermediate_size=F,
            hidden_act=n["activation"],
            _experts_implementation="eager",
        )
        weights = {"gate_up_proj": a["gate_up_E2FU"], "down_proj": a["down_EUF"]}
        given = (a["x_MU"], experts_of(a), a["gate_MK"])
        return {"y_MU": torch.func.functional_call(MixtralExperts(config), weights, given)}

    def has_such_experts(a: Tensors) -> bool:
        """It drops no choice and has no norm inside an expert."""
        return "sub_norm_EF" not in a and bool((a["dispatch.slot_MK"] >= 0).all())

    return {
        "rms_norm": hf_rms_norm,
        "rms_norm_backward": lambda a, n: gradients(hf_rms_norm, a, n, ["x_ND", "w_D"], y_ND="dy_ND"),
        "rotate_in_place": hf_rotate,
        "attention": hf_attention,
        "attention_backward": lambda a, n: attention_backward(a, n, hf_attention),
        "route": hf_route,
        "expert_ffn": lambda a, n: hf_experts(a, n) if has_such_experts(a) else None,
        "expert_ffn_backward": lambda a, n: (
            expert_ffn_backward(a, n, hf_experts) if has_such_experts(a) else None
        ),
    }


def compute(folder: Path, library: str, functions: dict[str, Any]) -> None:
    """Every call that the peer can."""
    for i, call in enumerate(json.loads((folder / "calls.json").read_text())):
        function = functions.get(call["operation"])
        if function is None:
            continue
        with np.load(folder / f"{i}.npz") as file:
            operands = {name: torch.from_numpy(array) for name, array in file.items()}
        results = function(operands, call["numbers"])
        if results is not None:
            arrays = {name: tensor.detach().numpy() for name, tensor in results.items()}
            np.savez(folder / f"{i}.out.npz", **arrays)
    (folder / "version").write_text(f"{library} {importlib.metadata.version(library)}")


def main() -> None:
    """One peer after the other."""
    folder, *peers = sys.argv[1:]
    for peer in peers:
        if peer == "torch":
            compute(Path(folder, peer), "torch", TORCH)
        else:
            compute(Path(folder, peer), "transformers", hugging_face())


if __name__ == "__main__":
    main()
