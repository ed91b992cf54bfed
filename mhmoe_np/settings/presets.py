"""Named models: the five of the paper's tables, and the same five at a quarter of the width.

The quarter-width family keeps the paper's FLOPs parity exactly.

Source   [spec 7 Paper configs], [P1 section 3]
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.run import Tables, merge

_WIDTHS = {"hidden_size": 768, "intermediate_size": 2048}
_PAPER_BACKBONE = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_SMALL_BACKBONE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}

# Name -> the paper's inner width of one expert, and the keys that do not scale with the width.
_EXPERTS = {
    "dense": (0, {}),
    "smoe": (2048, {"num_experts": 8, "num_experts_per_tok": 1}),
    "fine-grained-smoe": (1024, {"num_experts": 16, "num_experts_per_tok": 2}),
    "mh-moe-2": (768, {"num_experts": 40, "num_experts_per_tok": 2, "moe_heads": 2}),
    "mh-moe-3": (512, {"num_experts": 96, "num_experts_per_tok": 3, "moe_heads": 3}),
}

PAPER_MODELS = tuple(_EXPERTS)
"""The names of the five, in the order of the paper's tables."""


def _preset(name: str, backbone: dict[str, int], *, width_divisor: int) -> ModelConfig:
    """One of the five models, every width of the paper's divided by `width_divisor`."""
    inner, experts = _EXPERTS[name]
    widths = {**_WIDTHS, "moe_intermediate_size": inner}
    return ModelConfig.model_validate(
        {
            **backbone,
            **{key: width // width_divisor for key, width in widths.items()},
            **experts,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        }
    )


MODEL_PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {f"paper-{name}": _preset(name, _PAPER_BACKBONE, width_divisor=1) for name in PAPER_MODELS}
    | {f"small-{name}": _preset(name, _SMALL_BACKBONE, width_divisor=4) for name in PAPER_MODELS}
)
"""Preset name -> model: `paper-<name>` and `small-<name>` for each name of `PAPER_MODELS`."""

_LARGE_TRAINING: Tables = {
    "training": {
        "steps": 100_000,
        "batch_size": 256,
        "gradient_accumulation_steps": 256,
        "sequence_length": 2048,
        "checkpoint_every": 50,
    },
    "optimizer": {"learning_rate": 6e-4, "final_learning_rate": 3e-5, "warmup_steps": 375},
}
_SMALL_TRAINING: Tables = {
    "training": {"steps": 900, "batch_size": 16, "sequence_length": 256},
    "optimizer": {"learning_rate": 2e-3, "final_learning_rate": 1e-4, "warmup_steps": 50},
}
DEFAULT_PRESET = "quick"
_QUICK: Tables = {
    "model": {
        "vocab_size": 2048,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 256,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "moe_heads": 2,
    },
    "training": {"steps": 160, "batch_size": 16, "sequence_length": 256, "checkpoint_every": 40},
    "optimizer": {"learning_rate": 4e-3, "final_learning_rate": 2e-4, "warmup_steps": 30},
}

_FLOAT_PRESETS: dict[str, Tables] = {DEFAULT_PRESET: _QUICK} | {
    name: {
        "model": config.model_dump(exclude_unset=True),
        **(_LARGE_TRAINING if name.startswith("paper-") else _SMALL_TRAINING),
    }
    for name, config in MODEL_PRESETS.items()
}


def _bitnet(tables: Tables) -> Tables:
    """The same run with ternary weights and BitNet's recipe [spec 6].

    The rate's peak is 2.5 times as high (6e-4 becomes 1.5e-3), it drops at half-way, and so does the
    weight decay, to 0.
    """
    peak = 2.5 * tables["optimizer"]["learning_rate"]
    return merge(
        tables,
        {
            "model": {"quantization": "bitnet_b158"},
            "optimizer": {"learning_rate": peak, "schedule": "two-stage"},
        },
    )


RUN_PRESETS: Mapping[str, Tables] = MappingProxyType(
    _FLOAT_PRESETS | {f"{name}-bitnet": _bitnet(tables) for name, tables in _FLOAT_PRESETS.items()}
)
"""Preset name -> the tables of a training run; `...-bitnet` is the same run with BitNet's recipe."""


def described(config: ModelConfig) -> str:
    """What kind of model it is, in a few words, as "MH-MoE, 2 heads, 40 experts, top 2, ternary"."""
    words = ["dense"]
    if config.num_experts:
        kind = ["MoE"] if config.moe_heads == 1 else ["MH-MoE", f"{config.moe_heads} heads"]
        words = [*kind, f"{config.num_experts} experts", f"top {config.num_experts_per_tok}"]
    if config.shared_expert_intermediate_size:
        words.append("shared expert")
    if config.quantization != "none":
        words.append("ternary" if config.quantization == "bitnet_b158" else "1-bit")
    return ", ".join(words)
