"""The classes of transformers whose mathematics is ours: what their keys and tensors are called.

For each key that decides anything there is a line here; what is not listed is refused. Checked against
transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mhmoe_np.exchange.hf_names import (
    GRANITE_4,
    GRANITE_5,
    JOINED_EXPERTS,
    MIXTRAL_4,
    PLAIN,
    Spelling,
)
from mhmoe_np.settings.model import ModelConfig


class HfClass(NamedTuple):
    """A class of transformers."""

    architecture: str
    model_type: str
    keys: Mapping[str, str]  # its keys that have a counterpart, and ours
    defaults: Mapping[str, Any]  # of its keys: what it takes where the file has none
    implied: Mapping[str, Any]  # of our keys: what it does without a key
    needed: Mapping[str, tuple[Any, ...]]  # its keys with one meaning here; null is always allowed
    spellings: tuple[Spelling, ...]  # the first one is written
    has_bit_linears: bool = False  # whether it may have BitNet's quantization_config


def _same(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


COMMON = _same(
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
)
ROUTED = _same("num_experts_per_tok", "router_aux_loss_coef")
UNTIED = {"tie_word_embeddings": False}
NO_BIAS = {"attention_bias": (False,), "attention_dropout": (0.0,)}
# The balance loss of transformers pools the layers and counts all choices: "topk" is nearest to it.
RENORMALISED = {"decoder_sparse_step": 1, "norm_topk_prob": True, "router_aux_loss_type": "topk"}

LLAMA = HfClass(
    "LlamaForCausalLM",
    "llama",
    keys={**COMMON, **_same("intermediate_size")},
    defaults={**UNTIED, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    implied={},
    needed={
        **NO_BIAS,
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
    },
    spellings=(PLAIN,),
    has_bit_linears=True,
)
MISTRAL = HfClass(
    "MistralForCausalLM",
    "mistral",
    keys=LLAMA.keys,
    defaults={
        **UNTIED,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
    implied={},
    needed={"attention_dropout": (0.0,), "sliding_window": ()},
    spellings=(PLAIN,),
    has_bit_linears=True,
)
BITNET = HfClass(
    "BitNetForCausalLM",
    "bitnet",
    keys=LLAMA.keys,
    defaults={
        **UNTIED,
        "num_key_value_heads": 5,
        "hidden_act": "relu2",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    },
    implied={"use_sub_norm": True},
    needed=NO_BIAS,
    spellings=(PLAIN,),
    has_bit_linears=True,
)
MIXTRAL = HfClass(
    "MixtralForCausalLM",
    "mixtral",
    keys={
        **COMMON,
        **ROUTED,
        "intermediate_size": "moe_intermediate_size",
        "num_local_experts": "num_experts",
    },
    defaults={
        **UNTIED,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    },
    implied=RENORMALISED,
    needed={"attention_dropout": (0.0,), "sliding_window": (), "router_jitter_noise": (0.0,)},
    spellings=(MIXTRAL_4, JOINED_EXPERTS),
)
GRANITE = HfClass(
    "GraniteMoeSharedForCausalLM",
    "granitemoeshared",
    keys={**MIXTRAL.keys, "shared_intermediate_size": "shared_expert_intermediate_size"},
    defaults={
        **UNTIED,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_multiplier": 1.0,
    },
    implied=RENORMALISED,
    needed={
        **NO_BIAS,
        "embedding_multiplier": (1.0,),
        "residual_multiplier": (1.0,),
        "logits_scaling": (1.0,),
    },
    spellings=(GRANITE_4, GRANITE_5),
)
QWEN2_MOE = HfClass(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    keys={
        **COMMON,
        **ROUTED,
        **_same(
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "num_experts",
            "norm_topk_prob",
            "decoder_sparse_step",
        ),
    },
    defaults={
        **UNTIED,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "qkv_bias": True,
    },
    implied={"router_aux_loss_type": "topk"},
    needed={
        "qkv_bias": (False,),
        "attention_dropout": (0.0,),
        "use_sliding_window": (False,),
        "mlp_only_layers": ([],),
    },
    spellings=(PLAIN, JOINED_EXPERTS),
)
OURS = HfClass(
    "MhMoeForCausalLM",
    "mhmoe",
    keys=_same(*(key for key in ModelConfig.model_fields if key not in ("model_type", "rope_theta"))),
    defaults={"rope_theta": 10_000.0},
    implied={},
    needed={},
    spellings=(PLAIN,),
)
CLASSES = {
    known.model_type: known for known in (LLAMA, MISTRAL, BITNET, MIXTRAL, GRANITE, QWEN2_MOE, OURS)
}
# Why a class that is asked for often is not there.
REFUSED = {
    "olmoe": "normalises queries and keys (self_attn.q_norm, k_norm)",
    "qwen3": "normalises queries and keys (self_attn.q_norm, k_norm)",
    "qwen3_moe": "normalises queries and keys (self_attn.q_norm, k_norm)",
    "qwen2": "adds biases to queries, keys and values (self_attn.q_proj.bias)",
    "gemma": "scales embeddings and adds 1 to the weights of its norms",
    "gemma2": "scales embeddings, adds 1 to the weights of its norms and has more of them",
    "phi3": "joins queries, keys and values, and gate and up",
}


def counterpart(config: ModelConfig) -> HfClass | None:
    """The class of transformers that computes what this model does, if there is one.

    Capacity is left out of account: evaluation drops nothing [D4].
    """
    D, A, C = config.hidden_size, config.num_attention_heads, config.head_dim
    if config.quantization == "bitnet":
        return None
    if config.moe_layers == 0:
        if config.use_sub_norm:
            return BITNET if A * C == D else None  # its attn_sub_norm is D wide
        return LLAMA if D % A == 0 else None  # it insists, whatever head_dim says
    if config.is_quantised or config.use_sub_norm or config.moe_residual:
        return None
    if config.moe_heads > 1 or config.moe_head_layer or config.moe_merge_layer:
        return None
    if config.norm_topk_prob and config.moe_layers == config.num_hidden_layers:
        return GRANITE if config.shared_expert_intermediate_size else MIXTRAL
    return QWEN2_MOE
