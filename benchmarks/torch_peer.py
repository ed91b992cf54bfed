r"""The PyTorch eager peer of the training benchmark: the same model, written as a user would.

Run as a process of its own, so that its threads and its memory allocator are its own:

    python -m benchmarks.torch_peer --size A --model mhmoe --threads 2 \
        --weights FILE.safetensors --tokens FILE.npy

It answers lines on standard input with one line each on standard output: `ready` once when it has
loaded; `loss` -> "<mean NLL> <NLL + balance loss>" of the first batch; `steps N` -> the seconds
that N training steps took; `quit` ends it. The tokens are an integer array
[batches, B, T+1], used in turn. The weights have the names of a checkpoint, embedding untied.

Give the process a memory allocator that keeps what it frees for a fair comparison:
MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ in its environment.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mhmoe_np.config import ModelConfig

LEARNING_RATE = 6e-4
CLIP_NORM = 2.0


class Size(NamedTuple):
    """One of the two sizes everything is compared at."""

    batch: int  # B
    backbone: dict[str, int]
    models: dict[str, dict[str, int]]


SIZES = {
    "A": Size(
        batch=8,
        backbone={
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "vocab_size": 8192,
            "intermediate_size": 512,
        },
        models={
            "dense": {},
            "smoe": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 512},
            "mhmoe": {
                "num_experts": 16,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 176,
                "moe_heads": 2,
            },
        },
    ),
    "B": Size(
        batch=4,
        backbone={
            "hidden_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "vocab_size": 8192,
            "intermediate_size": 2048,
        },
        models={
            "dense": {},
            "smoe": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 2048},
            "mhmoe": {
                "num_experts": 40,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 768,
                "moe_heads": 2,
            },
        },
    ),
}


def benchmark_config(size: str, model: str) -> ModelConfig:
    """The configuration of a benchmark model: every layer MoE, head untied."""
    return ModelConfig.model_validate(
        {
            **SIZES[size].backbone,
            **SIZES[size].models[model],
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        }
    )


class RMSNorm(nn.Module):
    """Pre-norm of the model width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention; query, key and value in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, T, D))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the rotate-half form."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), gate and up stacked in one matrix."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class FeedForward(nn.Module):
    """SwiGLU, as a dense network or as one expert; gate and up in one matrix."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * inner, width))
        self.down = nn.Parameter(torch.empty(width, inner))

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_up, self.down)


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
            FeedForward(U, config.moe_intermediate_size) for _ in range(config.num_experts)
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = (
            MoE(config)
            if config.num_experts
            else FeedForward(config.hidden_size, config.intermediate_size)
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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
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


class Trainer:
    """A model, its optimiser and its place in the batches."""

    def __init__(self, model: Decoder, batches: Tensor) -> None:
        self.model = model
        self.batches = batches
        self.steps_made = 0
        self.optimiser = torch.optim.AdamW(
            model.parameters(),
            lr=LEARNING_RATE,
            betas=(0.9, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            fused=True,
        )

    def loss(self) -> tuple[float, float]:
        """Mean NLL and loss of the first batch, with the weights as they are."""
        with torch.no_grad():
            nll, total = self.model(self.batches[0])
        return nll.item(), total.item()

    def step(self) -> None:
        """One update, on the next batch."""
        _, loss = self.model(self.batches[self.steps_made % len(self.batches)])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimiser.step()
        self.steps_made += 1


def answer(trainer: Trainer, request: str) -> str:
    """The answer to one line of the protocol."""
    match request.split():
        case ["loss"]:
            nll, total = trainer.loss()
            return f"{nll!r} {total!r}"
        case ["steps", count]:
            start = time.perf_counter()
            for _ in range(int(count)):
                trainer.step()
            return repr(time.perf_counter() - start)
        case _:
            raise SystemExit(f"unknown request {request!r}; use loss, steps N or quit")


def main() -> None:
    """Load the model and answer requests until `quit` or the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--model", choices=SIZES["A"].models, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = Decoder(benchmark_config(options.size, options.model))
    load(model, load_file(options.weights))
    trainer = Trainer(model, torch.from_numpy(np.load(options.tokens)).long())
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        print(answer(trainer, line), flush=True)


if __name__ == "__main__":
    main()
