"""Named models: the five of the paper's tables, and the same five at a quarter of the width.

Source [spec 7], [P1 section 3]; the quarter-width family is the pilot of paper.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mhmoe_np.config import ModelConfig

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
