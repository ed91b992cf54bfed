"""An MH-MoE layer as a PyTorch module, and how it is run on the conformance vectors.

Written from SPECIFICATION.md, sections 3 to 5. Its parameters have the names of section 1, so a vector
holds a state dict; gradients come from autograd, BitNet's by the straight-through trick.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Config = dict[str, Any]


class BitLinear(nn.Linear):
    """`nn.Linear`, quantised as `quantization` says."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, quantization: str) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.quantization = quantization

    def forward(self, x: Tensor) -> Tensor:
        if self.quantization == "none":
            return super().forward(x)
        # Quantised there, the identity back.
        acting_x = x + (self.quantised_rows(x) - x).detach()
        acting_weight = self.weight + (self.quantised_weight() - self.weight).detach()
        return functional.linear(acting_x, acting_weight, self.bias)

    @staticmethod
    def quantised_rows(x: Tensor) -> Tensor:
        gamma = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return torch.round(x * (127 / gamma)).clamp(-128, 127) * (gamma / 127)

    def quantised_weight(self) -> Tensor:
        beta = self.weight.abs().mean().clamp(min=1e-5)
        if self.quantization == "bitnet_b158":
            return beta * torch.round(self.weight * (1 / beta)).clamp(-1, 1)
        return torch.where(self.weight > self.weight.mean(), beta, -beta)


class Expert(nn.Module):
    """down(norm(act(gate(x)) * up(x))), the norm only with `use_sub_norm`."""

    def __init__(self, config: Config, width: int, inner: int) -> None:
        super().__init__()
        quantization = config["quantization"]
        self.gate_proj = BitLinear(width, inner, quantization=quantization)
        self.up_proj = BitLinear(width, inner, quantization=quantization)
        self.down_proj = BitLinear(inner, width, quantization=quantization)
        self.ffn_sub_norm: nn.Module = nn.Identity()
        if config["use_sub_norm"]:
            self.ffn_sub_norm = nn.RMSNorm(inner, eps=config["rms_norm_eps"])
        self.squared = config["hidden_act"] == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        act = functional.relu(gate) ** 2 if self.squared else functional.silu(gate)
        return self.down_proj(self.ffn_sub_norm(act * self.up_proj(x)))


class MultiHeadMoE(nn.Module):
    """Section 3: split, route, join, merge."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, E = config["hidden_size"], config["num_experts"]
        self.U = D // config["moe_heads"]
        projection = {
            "bias": config["moe_projection_bias"],
            "quantization": config["quantization"] if config["quantize_moe_projections"] else "none",
        }
        has_head, has_merge = config["moe_head_layer"], config["moe_merge_layer"]
        self.head_proj = BitLinear(D, D, **projection) if has_head else nn.Identity()
        self.merge_proj = BitLinear(D, D, **projection) if has_merge else nn.Identity()
        self.gate = nn.Linear(self.U, E, bias=False)
        self.experts = nn.ModuleList(
            Expert(config, self.U, config["moe_intermediate_size"]) for _ in range(E)
        )
        shared = config["shared_expert_intermediate_size"]
        self.shared_expert = Expert(config, D, shared) if shared else None

    def forward(self, x: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """x [N, D]; counted [N]: which tokens the router's losses see."""
        sub_tokens = self.head_proj(x).reshape(-1, self.U)
        logits = self.gate(sub_tokens)
        p = torch.softmax(logits, dim=-1)
        gates, experts = self.choose(p)
        kept = self.kept(experts)
        y = torch.zeros_like(sub_tokens)
        for e, expert in enumerate(self.experts):
            row, choice = torch.nonzero((experts == e) & kept, as_tuple=True)
            if len(row):
                y = y.index_add(0, row, gates[row, choice, None] * expert(sub_tokens[row]))
        if self.config["moe_residual"]:
            y = y + sub_tokens
        y = self.merge_proj(y.reshape(x.shape))
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        counted = counted.repeat_interleave(self.config["moe_heads"])
        aux, z = self.router_losses(logits[counted], p[counted], experts[counted])
        return {
            "router_logits": logits,
            "experts": experts,
            "y_ND": y,
            "aux_loss": aux,
            "z_loss": z,
        }

    def choose(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and experts. A stable sort leaves ties to the lower index; `topk` promises nothing."""
        order = torch.sort(p.detach(), dim=-1, descending=True, stable=True).indices
        experts = order[:, : self.config["num_experts_per_tok"]]
        gates = p.gather(1, experts)
        if self.config["norm_topk_prob"]:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return gates, experts

    def kept(self, experts: Tensor) -> Tensor:
        """Which choices are within the experts' capacity: all first choices, then all second ones."""
        factor = self.config["moe_capacity_factor"]
        if factor is None:
            return torch.ones_like(experts, dtype=torch.bool)
        M, K = experts.shape
        E = self.config["num_experts"]
        capacity = max(1, math.ceil(factor * K * math.ceil(M / E)))
        chosen = functional.one_hot(experts.T.reshape(-1), E)  # in filling order
        place = (chosen.cumsum(dim=0) * chosen).sum(dim=-1)  # from 1
        return (place <= capacity).reshape(K, M).T

    def router_losses(self, logits: Tensor, p: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Balance loss and z-loss, section 4."""
        E = self.config["num_experts"]
        choices = experts[:, :1] if self.config["router_aux_loss_type"] == "top1" else experts
        share = torch.bincount(choices.reshape(-1), minlength=E).to(p.dtype) / choices.numel()
        return E * (share * p.mean(dim=0)).sum(), torch.logsumexp(logits, dim=-1).square().mean()


def results_of(layer: type[MultiHeadMoE], config: Config, tensors: dict[str, Any], dtype: Any) -> Any:
    """One vector `moe_layer/...`: its results and gradients as NumPy's arrays.

    config: the vector's options; tensors: its file.
    """
    given = {name: torch.from_numpy(array) for name, array in tensors.items()}
    module = layer(config).to(dtype)
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: given[f"mlp.{name}"] for name in names})
    x = given["x_ND"].to(dtype).requires_grad_()
    results = module(x, given["counted_N"])
    total = (results["y_ND"] * given["dy_ND"].to(dtype)).sum()
    total = total + config["router_aux_loss_coef"] * results["aux_loss"]
    total = total + config["router_z_loss_coef"] * results["z_loss"]
    total.backward()
    found = {**results, "dx_ND": x.grad}
    for name, parameter in module.named_parameters():
        zeros = torch.zeros_like(parameter)  # of an expert without a row
        found[f"grad.mlp.{name}"] = zeros if parameter.grad is None else parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in found.items()}
