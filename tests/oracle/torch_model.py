"""The model of `spec.md` once more, in PyTorch: the oracle the NumPy implementation is held to.

Written from the specification alone, with autograd for every gradient except the straight-through
BitLinear, whose backward section 5 prescribes. Clarity before speed: plain loops over experts.
"§" in a comment is a section of the specification; capitals in shapes are its dimension letters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PADDING = -100

# ------------------------------------------------------------------------- configuration, §1


@dataclasses.dataclass
class Config:
    """The model keys of `config.json`; None stands for a default that depends on other keys."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "mhmoe"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 2
    moe_heads: int = 1
    moe_head_layer: bool | None = None
    moe_merge_layer: bool | None = None
    moe_projection_bias: bool = False
    moe_residual: bool = False
    norm_topk_prob: bool | None = None
    moe_capacity_factor: float | None = None
    shared_expert_intermediate_size: int = 0
    router_aux_loss_type: str = "top1"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    quantization: str = "none"
    use_sub_norm: bool | None = None
    quantize_moe_projections: bool = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_head_layer is None:
            self.moe_head_layer = self.moe_heads > 1
        if self.moe_merge_layer is None:
            self.moe_merge_layer = self.moe_heads > 1
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1
        if self.use_sub_norm is None:
            self.use_sub_norm = self.quantization != "none"

    def is_moe(self, layer: int) -> bool:
        """Whether the FFN of this 0-based layer is MoE."""
        return self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0


def read_config(content: dict[str, Any]) -> Config:
    """Turn the content of a `config.json` into a checked Config; a null counts as omitted."""
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"unknown config keys: {unknown}")
    config = Config(**{key: value for key, value in content.items() if value is not None})
    _check_config(config)
    return config


def _check_config(config: Config) -> None:
    choices = {
        "model_type": ("mhmoe",),
        "hidden_act": ("silu", "relu2"),
        "router_aux_loss_type": ("top1", "topk"),
        "quantization": ("none", "bitnet_b158", "bitnet"),
    }
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key} must be one of {allowed}")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError("attention heads must divide into key/value heads, head_dim must be even")
    if config.num_experts > 0:
        if not 1 <= config.num_experts_per_tok <= config.num_experts:
            raise ValueError("num_experts_per_tok must lie in 1..num_experts")
        if config.moe_intermediate_size < 1:
            raise ValueError("an MoE model needs moe_intermediate_size")
        if config.hidden_size % config.moe_heads:
            raise ValueError("moe_heads must divide hidden_size")
        if config.num_experts_per_tok == 1 and config.norm_topk_prob:
            raise ValueError("norm_topk_prob must stay false with one expert per sub-token")


# ------------------------------------------------------------------------ tensor names, §1

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: Config) -> Shapes:
    """The name and shape of every tensor a checkpoint of this config holds."""
    V, D = config.vocab_size, config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        shapes |= _attention_shapes(config, f"{layer}.self_attn")
        if config.is_moe(i):
            shapes |= _moe_shapes(config, f"{layer}.mlp")
        else:
            shapes |= _ffn_shapes(config, f"{layer}.mlp", D, config.intermediate_size)
    return shapes


def _attention_shapes(config: Config, prefix: str) -> Shapes:
    D, C = config.hidden_size, config.head_dim
    query_width, key_width = config.num_attention_heads * C, config.num_key_value_heads * C
    shapes: Shapes = {
        f"{prefix}.q_proj.weight": (query_width, D),
        f"{prefix}.k_proj.weight": (key_width, D),
        f"{prefix}.v_proj.weight": (key_width, D),
        f"{prefix}.o_proj.weight": (D, query_width),
    }
    if config.use_sub_norm:
        shapes[f"{prefix}.attn_sub_norm.weight"] = (query_width,)
    return shapes


def _ffn_shapes(config: Config, prefix: str, width: int, F: int) -> Shapes:
    shapes: Shapes = {
        f"{prefix}.gate_proj.weight": (F, width),
        f"{prefix}.up_proj.weight": (F, width),
        f"{prefix}.down_proj.weight": (width, F),
    }
    if config.use_sub_norm:
        shapes[f"{prefix}.ffn_sub_norm.weight"] = (F,)
    return shapes


def _moe_shapes(config: Config, prefix: str) -> Shapes:
    D, E = config.hidden_size, config.num_experts
    U = D // config.moe_heads
    shapes: Shapes = {f"{prefix}.gate.weight": (E, U)}
    for e in range(E):
        shapes |= _ffn_shapes(config, f"{prefix}.experts.{e}", U, config.moe_intermediate_size)
    switches = {"head_proj": config.moe_head_layer, "merge_proj": config.moe_merge_layer}
    for name, present in switches.items():
        if present:
            shapes[f"{prefix}.{name}.weight"] = (D, D)
            if config.moe_projection_bias:
                shapes[f"{prefix}.{name}.bias"] = (D,)
    if config.shared_expert_intermediate_size > 0:
        F = config.shared_expert_intermediate_size
        shapes |= _ffn_shapes(config, f"{prefix}.shared_expert", D, F)
    return shapes


def check_weights(config: Config, weights: dict[str, np.ndarray]) -> None:
    """Refuse a missing, an unused or a misshapen tensor."""
    shapes = expected_shapes(config)
    if missing := sorted(set(shapes) - set(weights)):
        raise ValueError(f"missing weights: {missing}")
    if unused := sorted(set(weights) - set(shapes)):
        raise ValueError(f"unused weights: {unused}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, expected {shape}")


# ---------------------------------------------------------------------------- BitNet, §5


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit integers q of each row, and the row's largest magnitude γ [rows, 1]."""
    gamma = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    q = torch.round(x * (127 / gamma)).clamp(-128, 127)  # torch rounds half to even
    return q, gamma


def quantize_weight(weight: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """Return the ternary or sign matrix w, and its scale β."""
    beta = weight.abs().mean().clamp(min=1e-5)
    if quantization == "bitnet_b158":
        return torch.round(weight * (1 / beta)).clamp(-1, 1), beta
    above_mean = weight - weight.mean() > 0
    return torch.where(above_mean, 1.0, -1.0).to(weight.dtype), beta


class BitLinear(torch.autograd.Function):
    """y = (q @ wᵀ)·(β·(γ/127)), with the straight-through backward of §5; x is [rows, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantization: str) -> Tensor:
        q, gamma = quantize_rows(x)
        w, beta = quantize_weight(weight, quantization)
        ctx.save_for_backward(q, gamma, w, beta)
        return (q @ w.T) * (beta * (gamma / 127))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        q, gamma, w, beta = ctx.saved_tensors
        dx = dy @ (beta * w)
        dweight = dy.T @ (q * gamma / 127)
        return dx, dweight, None


def linear(x: Tensor, weight: Tensor, quantization: str) -> Tensor:
    """Apply `x @ W.T`, quantised unless quantization is "none"."""
    if quantization == "none":
        return x @ weight.T
    rows = x.reshape(-1, x.shape[-1])
    return BitLinear.apply(rows, weight, quantization).reshape(*x.shape[:-1], weight.shape[0])


# -------------------------------------------------------------------------- backbone, §2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE on [B, T, heads, C]: feature j of the first half of C pairs with j of the second."""
    T, C = x.shape[1], x.shape[3]
    frequency = theta ** (-2 * torch.arange(C // 2, dtype=torch.float64) / C)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency  # [T, C/2]
    cos, sin = (part.to(x.dtype)[None, :, None, :] for part in (angle.cos(), angle.sin()))
    first, second = x[..., : C // 2], x[..., C // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(config: Config, weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Causal grouped-query attention; query head a reads key/value head a // (A/G)."""
    B, T, _ = x.shape
    A, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(name: str, heads: int) -> Tensor:
        y = linear(x, weights[f"{prefix}.{name}.weight"], config.quantization)
        return y.reshape(B, T, heads, C)

    q = rotate(project("q_proj", A), config.rope_theta)
    k = rotate(project("k_proj", G), config.rope_theta).repeat_interleave(A // G, dim=2)
    v = project("v_proj", G).repeat_interleave(A // G, dim=2)
    scores = torch.einsum("btac,bsac->bats", q, k) / math.sqrt(C)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    share = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    y = torch.einsum("bats,bsac->btac", share, v).reshape(B, T, A * C)
    if config.use_sub_norm:
        y = rms_norm(y, weights[f"{prefix}.attn_sub_norm.weight"], config.rms_norm_eps)
    return linear(y, weights[f"{prefix}.o_proj.weight"], config.quantization)


def ffn(config: Config, weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)): the dense FFN, one expert, and the shared expert alike."""
    gate = linear(x, weights[f"{prefix}.gate_proj.weight"], config.quantization)
    up = linear(x, weights[f"{prefix}.up_proj.weight"], config.quantization)
    act = gate * torch.sigmoid(gate) if config.hidden_act == "silu" else torch.relu(gate) ** 2
    y = act * up
    if config.use_sub_norm:
        y = rms_norm(y, weights[f"{prefix}.ffn_sub_norm.weight"], config.rms_norm_eps)
    return linear(y, weights[f"{prefix}.down_proj.weight"], config.quantization)


# --------------------------------------------------------------------- MH-MoE layer, §3, §4


@dataclasses.dataclass
class Routing:
    """What the router of one layer decided for its M sub-tokens."""

    logits: Tensor  # [M, E]
    p: Tensor  # [M, E]
    experts: Tensor  # [M, K]
    gates: Tensor  # [M, K]


def route(config: Config, router: Tensor, x: Tensor) -> Routing:
    logits = x @ router.T
    p = torch.softmax(logits, dim=-1)
    # A stable sort keeps equal p in index order: ties go to the lower expert.
    order = torch.sort(p.detach(), dim=-1, descending=True, stable=True).indices
    experts = order[:, : config.num_experts_per_tok]
    gates = p.gather(1, experts)
    if config.norm_topk_prob:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return Routing(logits, p, experts, gates)


def capacity(factor: float, K: int, M: int, E: int) -> int:
    """The most assignments one expert takes, §4."""
    return max(1, math.ceil(factor * K * math.ceil(M / E)))


def within_capacity(experts: Tensor, E: int, limit: int) -> Tensor:
    """Which of the [M, K] assignments are kept: all first choices, then all second, and so on."""
    M, K = experts.shape
    kept = torch.zeros(M, K, dtype=torch.bool)
    taken = [0] * E
    for j in range(K):
        for s in range(M):
            e = int(experts[s, j])
            if taken[e] < limit:
                taken[e] += 1
                kept[s, j] = True
    return kept


def kept_assignments(config: Config, experts: Tensor) -> Tensor:
    M, K = experts.shape
    if config.moe_capacity_factor is None:
        return torch.ones(M, K, dtype=torch.bool)
    limit = capacity(config.moe_capacity_factor, K, M, config.num_experts)
    return within_capacity(experts, config.num_experts, limit)


def run_experts(
    config: Config, weights: dict[str, Tensor], prefix: str, x: Tensor, routing: Routing
) -> Tensor:
    """Σ_j g[s,j] · Expert_{I[s,j]}(x[s]) over the kept assignments; the rest contribute zero."""
    kept = kept_assignments(config, routing.experts)
    y = torch.zeros_like(x)
    for e in range(config.num_experts):
        rows, choice = torch.nonzero((routing.experts == e) & kept, as_tuple=True)
        if len(rows) > 0:
            output = ffn(config, weights, f"{prefix}.experts.{e}", x[rows])
            y = y.index_add(0, rows, routing.gates[rows, choice, None] * output)
    return y


def projection(config: Config, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The head or the merge layer, in full precision unless `quantize_moe_projections`."""
    quantization = config.quantization if config.quantize_moe_projections else "none"
    y = linear(x, weights[f"{name}.weight"], quantization)
    return y + weights[f"{name}.bias"] if config.moe_projection_bias else y


def moe(config: Config, weights: dict[str, Tensor], prefix: str, x: Tensor) -> tuple[Tensor, Routing]:
    """The MH-MoE layer on tokens [N, D]."""
    N, D = x.shape
    H = config.moe_heads
    tokens = projection(config, weights, f"{prefix}.head_proj", x) if config.moe_head_layer else x
    sub_tokens = tokens.reshape(N * H, D // H)  # token-major: row n·H + j
    routing = route(config, weights[f"{prefix}.gate.weight"], sub_tokens)
    y = run_experts(config, weights, prefix, sub_tokens, routing)
    if config.moe_residual:
        y = y + sub_tokens
    y = y.reshape(N, D)
    if config.moe_merge_layer:
        y = projection(config, weights, f"{prefix}.merge_proj", y)
    if config.shared_expert_intermediate_size > 0:
        y = y + ffn(config, weights, f"{prefix}.shared_expert", x)
    return y, routing


def balance_loss(p: Tensor, experts: Tensor, kind: str) -> Tensor:
    """E·Σ_e f_e·mean p_e over the sub-tokens given; the shares f are counts, without gradient."""
    E = p.shape[1]
    choices = experts[:, :1] if kind == "top1" else experts
    f = torch.bincount(choices.reshape(-1), minlength=E).to(p.dtype) / choices.numel()
    return E * (f * p.mean(dim=0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    return (torch.logsumexp(logits, dim=-1) ** 2).mean()


# ------------------------------------------------------------------------------ model, §2


def split_tokens(config: Config, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Check [B, T+1] token ids and return inputs and targets [B, T], padding still in place."""
    ids = np.array(tokens, dtype=np.int64)
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError("tokens must be [B, T+1] with T at least 1")
    padded = ids == PADDING
    if np.any(padded[:, :-1] & ~padded[:, 1:]):
        raise ValueError("padding is allowed only at the right end of a row")
    if np.any(~padded & ((ids < 0) | (ids >= config.vocab_size))):
        raise ValueError("token id outside the vocabulary")
    if np.all(padded[:, 1:]):
        raise ValueError("no target token to score")
    both = torch.from_numpy(ids)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def forward(
    config: Config, weights: dict[str, Tensor], inputs: Tensor
) -> tuple[dict[str, Tensor], list[Routing]]:
    """Return the forward part of the trace (§8) and the routing of each MoE layer."""
    eps = config.rms_norm_eps
    B, T = inputs.shape
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[inputs.where(inputs != PADDING, 0)]
    record: dict[str, Tensor] = {}
    routings: list[Routing] = []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        x = x + attention(config, weights, f"{layer}.self_attn", normed)
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        if config.is_moe(i):
            y, routing = moe(config, weights, f"{layer}.mlp", normed.reshape(B * T, -1))
            x = x + y.reshape(B, T, -1)
            routings.append(routing)
            record[f"layers.{i}.router_logits"] = routing.logits
            record[f"layers.{i}.experts"] = routing.experts
        else:
            x = x + ffn(config, weights, f"{layer}.mlp", normed)
        record[f"layers.{i}.hidden"] = x
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    record["logits"] = x @ head.T
    return record, routings


def losses(
    config: Config, logits: Tensor, routings: list[Routing], targets: Tensor
) -> dict[str, Tensor]:
    """nll, the uncoefficiented sums over layers aux_loss and z_loss, and their total; §4."""
    counted = targets != PADDING  # [B, T]
    nll = functional.cross_entropy(logits[counted], targets[counted])
    counted_rows = counted.reshape(-1).repeat_interleave(config.moe_heads)  # [M]
    aux, z = torch.zeros_like(nll), torch.zeros_like(nll)
    for routing in routings:
        p, experts = routing.p[counted_rows], routing.experts[counted_rows]
        aux = aux + balance_loss(p, experts, config.router_aux_loss_type)
        z = z + z_loss(routing.logits[counted_rows])
    loss = nll + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z
    return {"nll": nll, "aux_loss": aux, "z_loss": z, "loss": loss}


# ------------------------------------------------------------------------------ trace, §8


def trace(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    *,
    dtype: torch.dtype = torch.float64,
    gradients: bool = True,
) -> dict[str, np.ndarray]:
    """Run one forward and backward pass and return every tensor §8 names.

    `config` is the content of `config.json`, `weights` the tensors by their names on disk, `tokens`
    an integer array [B, T+1] that may end its rows in -100. A padding input is embedded as id 0 and
    routed like any other; a position whose target is -100 counts in no loss. Without `gradients`
    only the `grad.` tensors are left out; a weight that the loss does not reach has gradient zero.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError("dtype must be float32 or float64")
    settings = read_config(config)
    check_weights(settings, weights)
    inputs, targets = split_tokens(settings, tokens)
    leaves = {
        name: torch.from_numpy(np.array(array)).to(dtype).requires_grad_(gradients)
        for name, array in weights.items()
    }
    record, routings = forward(settings, leaves, inputs)
    totals = losses(settings, record["logits"], routings, targets)
    result = {"input_ids": inputs, "target_ids": targets} | record | totals
    if gradients:
        totals["loss"].backward()
        for name, leaf in leaves.items():
            result[f"grad.{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: tensor.detach().numpy() for name, tensor in result.items()}
