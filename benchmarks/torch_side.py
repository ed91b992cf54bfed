"""PyTorch's side of a comparison: the same model, written as a user would, eager or compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.protocol import OPTIMIZER, SGEMM, Options, read_options, serve
from benchmarks.sizes import benchmark_config
from mhmoe_np.operations.table import Blas
from mhmoe_np.settings.model import ModelConfig


class RMSNorm(nn.Module):
    """The norm before a layer, and the sub-norms of a quantised model."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention; query, key and value in one projection unless quantised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.quantised = config.is_quantised
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.norm = RMSNorm(D, config) if config.use_sub_norm else nn.Identity()
        self.o = BitLinear(D, D, config.is_quantised)

    def project(self, x: Tensor) -> Tensor:
        if not self.quantised:
            return self.qkv(x)
        x = x + (quantise_activations(x) - x).detach()
        parts = self.qkv.weight.chunk(3)
        return torch.cat([F.linear(x, w + (quantise_weight(w) - w).detach()) for w in parts], dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.project(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o(self.norm(y.transpose(1, 2).reshape(B, T, D)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the rotate-half form."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def linear(x: Tensor, weight: Tensor, quantised: bool) -> Tensor:
    """x @ weight.T; quantised: BitNet's fake quantisation, gradients straight through."""
    if quantised:
        x = x + (quantise_activations(x) - x).detach()
        weight = weight + (quantise_weight(weight) - weight).detach()
    return F.linear(x, weight)


def quantise_activations(x: Tensor) -> Tensor:
    """To 8 bits and back, row by row."""
    gamma = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * (127 / gamma)).round().clamp(-128, 127) * (gamma / 127)


def quantise_weight(weight: Tensor) -> Tensor:
    """To -1, 0, +1 and back."""
    beta = weight.abs().mean().clamp(min=1e-5)
    return (weight * (1 / beta)).round().clamp(-1, 1) * beta


class BitLinear(nn.Linear):
    """A linear map that is quantised where the model is."""

    def __init__(self, inputs: int, outputs: int, quantised: bool) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.quantised = quantised

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.quantised)


class FeedForward(nn.Module):
    """SwiGLU, as a dense network or as one expert; gate and up in one matrix unless quantised."""

    def __init__(self, width: int, inner: int, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * inner, width))
        self.down = nn.Parameter(torch.empty(width, inner))
        self.quantised = config.is_quantised
        self.norm = RMSNorm(inner, config) if config.use_sub_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.quantised:
            x = x + (quantise_activations(x) - x).detach()
            halves = self.gate_up.chunk(2)
            gate, up = (F.linear(x, w + (quantise_weight(w) - w).detach()) for w in halves)
        else:
            gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return linear(self.norm(F.silu(gate) * up), self.down, self.quantised)


class MoE(nn.Module):
    """MH-MoE; with one head and no projections, an ordinary sparse MoE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, U = config.hidden_size, config.sub_token_width
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.head = nn.Linear(D, D, bias=False) if config.moe_head_layer else nn.Identity()
        self.merge = nn.Linear(D, D, bias=False) if config.moe_merge_layer else nn.Identity()
        self.router = nn.Linear(U, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(U, config.moe_intermediate_size, config) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and its balance loss."""
        E, U = self.router.weight.shape
        sub = self.head(x).view(-1, U)
        probability = self.router(sub).softmax(dim=-1, dtype=torch.float32)
        gate, chosen = probability.topk(self.top_k, dim=-1)
        if self.normalise:
            gate = gate / gate.sum(dim=-1, keepdim=True)

        order = chosen.flatten().argsort(stable=True)
        count = torch.bincount(chosen.flatten(), minlength=E).tolist()
        source = order // self.top_k
        rows = sub.index_select(0, source).split(count)
        parts = [expert(part) for expert, part in zip(self.experts, rows, strict=True) if len(part)]
        weighted = torch.cat(parts) * gate.flatten()[order, None]
        y = torch.zeros_like(sub).index_add_(0, source, weighted)

        share = torch.bincount(chosen[:, 0], minlength=E) / len(sub)
        return self.merge(y.view_as(x)), E * (share * probability.mean(dim=0)).sum()


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = (
            MoE(config)
            if config.is_moe_layer(layer)
            else FeedForward(config.hidden_size, config.intermediate_size, config)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp(self.mlp_norm(x))
        if isinstance(y, tuple):
            return x + y[0], y[1]
        return x + y, None


class Decoder(nn.Module):
    """The language model and its loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.balance_coefficient = config.router_aux_loss_coef
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        C = config.head_dim
        frequency = config.rope_theta ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        angle = torch.outer(torch.arange(config.max_position_embeddings), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The mean NLL of a batch [B, T+1], and the loss: the same plus the balance loss."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        T = inputs.shape[1]
        x = self.embedding(inputs)
        balance = x.new_zeros(())
        for block in self.blocks:
            x, layer_balance = block(x, self.cos[:T], self.sin[:T])
            if layer_balance is not None:
                balance = balance + layer_balance
        logits = self.output(self.norm(x))
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return nll, nll + self.balance_coefficient * balance


def load(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors (the names of spec 1) into the model."""

    def joined(prefix: str, *names: str) -> Tensor:
        return torch.cat([weights[f"{prefix}.{name}_proj.weight"] for name in names])

    def load_feed_forward(module: FeedForward, prefix: str) -> None:
        module.gate_up.copy_(joined(prefix, "gate", "up"))
        module.down.copy_(weights[f"{prefix}.down_proj.weight"])

    with torch.no_grad():
        model.embedding.weight.copy_(weights["model.embed_tokens.weight"])
        model.norm.weight.copy_(weights["model.norm.weight"])
        model.output.weight.copy_(weights["lm_head.weight"])
        for i, block in enumerate(model.blocks):
            layer = f"model.layers.{i}"
            block.attention_norm.weight.copy_(weights[f"{layer}.input_layernorm.weight"])
            block.mlp_norm.weight.copy_(weights[f"{layer}.post_attention_layernorm.weight"])
            block.attention.qkv.weight.copy_(joined(f"{layer}.self_attn", "q", "k", "v"))
            block.attention.o.weight.copy_(weights[f"{layer}.self_attn.o_proj.weight"])
            if isinstance(block.mlp, FeedForward):
                load_feed_forward(block.mlp, f"{layer}.mlp")
                continue
            block.mlp.router.weight.copy_(weights[f"{layer}.mlp.gate.weight"])
            for e, expert in enumerate(block.mlp.experts):
                load_feed_forward(expert, f"{layer}.mlp.experts.{e}")
            for name, module in (("head", block.mlp.head), ("merge", block.mlp.merge)):
                if isinstance(module, nn.Linear):
                    module.weight.copy_(weights[f"{layer}.mlp.{name}_proj.weight"])


def optimiser_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as both sides use it."""
    return torch.optim.AdamW(
        parameters,
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )


class TorchSide:
    """See `protocol.Side`. `losses` gives a batch's mean NLL and its loss."""

    def __init__(
        self, model: nn.Module, losses: Callable[[Tensor], tuple[Tensor, Tensor]], batches: Tensor
    ) -> None:
        self._model, self._losses, self._batches = model, losses, batches
        self._calls = 0

    @cached_property
    def _optimiser(self) -> torch.optim.Optimizer:
        return optimiser_of(self._model.parameters())

    def _next_batch(self) -> Tensor:
        batch = self._batches[self._calls % len(self._batches)]
        self._calls += 1
        return batch

    def loss(self) -> tuple[float, float]:
        with torch.no_grad():
            nll, total = self._losses(self._batches[0])
        return nll.item(), total.item()

    def train_step(self) -> None:
        _, loss = self._losses(self._next_batch())
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_norm)
        self._optimiser.step()

    def evaluate_batch(self) -> None:
        with torch.no_grad():
            self._losses(self._next_batch())[0].item()

    def product(self) -> tuple[Callable[[], object], float]:
        x, out = torch.ones(SGEMM, SGEMM), torch.empty(SGEMM, SGEMM)
        return lambda: torch.mm(x, x, out=out), 2.0 * SGEMM**3

    def blas(self) -> Blas:
        built = torch.__config__.show()
        name = re.search(r"BLAS_INFO=(\w+)", built)
        version = re.search(r"Math Kernel Library Version (\d[\d.]*)", built)
        return Blas(name[1] if name else "unknown", version[1] if version else "", None)


def batches_of(options: Options) -> Tensor:
    return torch.from_numpy(np.load(options.tokens)).long()


def main() -> None:
    options = read_options(__doc__ or "")
    torch.set_num_threads(options.threads)
    model = Decoder(benchmark_config(options.size, options.model))
    load(model, load_file(options.weights))
    losses = torch.compile(model) if options.compile else model
    serve(TorchSide(model, losses, batches_of(options)))


if __name__ == "__main__":
    main()
