"""What a whole model costs in parameters and multiply-adds, part by part, in closed form.

Counts as `parity` does, which knows the feed-forward layers, and adds the rest of the model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mhmoe_np.costs import parity
from mhmoe_np.model.parameters import parameter_table
from mhmoe_np.settings.model import ModelConfig


class ParameterCount(NamedTuple):
    """How many parameters there are, and how many of them one token meets."""

    total: int
    active: int


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Every parameter, and those without the experts that a token does not choose.

    A token has H sub-tokens, each choosing K experts: at most H·K different ones.

    Source   [spec 1 tensor names], [spec 7 MoE-layer parameters]
    """
    total = sum(math.prod(entry.shape) for entry in parameter_table(config))
    idle = 0
    if config.num_experts:
        met = min(config.num_experts, config.moe_heads * config.num_experts_per_tok)
        matrices = 3 * config.sub_token_width * config.moe_intermediate_size
        norm = config.moe_intermediate_size if config.use_sub_norm else 0
        idle = config.moe_layers * (config.num_experts - met) * (matrices + norm)
    return ParameterCount(total, total - idle)


def macs_per_token(config: ModelConfig, sequence: int) -> dict[str, int]:
    """Multiply-adds of one token forward in each part, in sequences of `sequence` tokens.

    Of causal attention the half that is seen counts; norms, activations and additions do not. A
    training step costs three times as much, the backward of a product being two products.

    Source   [spec 2 attention], [spec 2 FFN], [spec 2 logits], [spec 7 multiply-adds]
    """
    D, L = config.hidden_size, config.num_hidden_layers
    inner = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    moe = config.moe_layers
    return {
        "attention projections": L * 2 * D * (inner + key_value),
        "attention": L * inner * sequence,
        "router": moe * parity.router_macs(config),
        "experts": moe * parity.moe_layer_macs(config) if moe else 0,
        "feed-forward": (L - moe) * 3 * D * config.intermediate_size,
        "output head": config.vocab_size * D,
    }
