"""The two sizes and the models that everything is compared at."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhmoe_np.settings.model import ModelConfig


class Size(NamedTuple):
    """One size: what its models share, and what each adds."""

    batch: int  # B
    backbone: dict[str, int]
    experts: dict[str, dict[str, Any]]
    sparse_step: int = 1  # every so many layers one has experts


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
        experts={
            "dense": {},
            "smoe": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 512},
            "mixtral": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
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
        experts={
            "dense": {},
            "smoe": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 2048},
            "mixtral": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024},
            "mhmoe": {
                "num_experts": 40,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 768,
                "moe_heads": 2,
            },
        },
    ),
}
PAPER = Size(  # the full width of the paper's models; 16,384 tokens a step
    batch=8,
    backbone={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "intermediate_size": 2048,
    },
    experts=SIZES["B"].experts,
    sparse_step=2,
)
GPU_SIZES = {**SIZES, "paper": PAPER}
BITNET = "-bitnet"
MODELS = ("dense", "smoe", "mhmoe", "mhmoe-bitnet", "mixtral")


def benchmark_config(size: str, model: str) -> ModelConfig:
    """The configuration of a benchmark model: its head untied, every layer MoE but at size `paper`.

    `mixtral` is what Mixtral can be and cost as much as `smoe`: a gate over one expert would always be
    1 in it, so two experts of half the width are chosen; its balance loss is over all layers at once,
    so neither side has one.
    """
    kind, chosen = model.removesuffix(BITNET), GPU_SIZES[size]
    return ModelConfig.model_validate(
        {
            **chosen.backbone,
            **chosen.experts[kind],
            "decoder_sparse_step": chosen.sparse_step,
            "tie_word_embeddings": False,
            "quantization": "bitnet_b158" if model.endswith(BITNET) else "none",
            "router_aux_loss_coef": 0.0 if kind == "mixtral" else 0.01,
        }
    )
