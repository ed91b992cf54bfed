"""The order in which a trace's tensors are computed, told from their names alone."""

from __future__ import annotations

from collections.abc import Iterable

GRADIENT = "grad."
ORDER = [
    "input_ids",
    "target_ids",
    "embed_tokens",
    "layers",
    "input_layernorm",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_rotated",
    "k_rotated",
    "attention",
    "attn_sub_norm",
    "o_proj",
    "post_attention_layernorm",
    "mlp",
    "head_proj",
    "gate",
    "input",
    "weight_integers",
    "weight_scale",
    "input_integers",
    "input_scale",
    "output",
    "router_logits",
    "experts",
    "probabilities",
    "gates",
    "sub_tokens",
    "gate_proj",
    "up_proj",
    "ffn_sub_norm",
    "down_proj",
    "merge_proj",
    "shared_expert",
    "hidden",
    "norm",
    "lm_head",
    "weight",
    "bias",
    "logits",
    "nll",
    "aux_loss",
    "z_loss",
    "loss",
]
RANK = {part: rank for rank, part in enumerate(ORDER)}
STANDS_FOR = {"router_logits": "mlp.gate.router_logits", "experts": "mlp.gate.experts"}
"""What a layer's own tensors are computed beside."""


def in_order(names: Iterable[str]) -> list[str]:
    """Forward first, then the gradients, in reverse; what no name tells goes to the end of its kind."""
    forward: list[str] = []
    gradients: list[str] = []
    for name in names:
        (gradients if name.startswith(GRADIENT) else forward).append(name)
    gradients.sort(key=lambda name: _place(name.removeprefix(GRADIENT)), reverse=True)
    return sorted(forward, key=_place) + gradients


def _place(name: str) -> list[tuple[int, int, str]]:
    parts = name.removeprefix("model.").split(".")
    if len(parts) == 3 and parts[0] == "layers":
        parts[2:] = STANDS_FOR.get(parts[2], parts[2]).split(".")
    return [
        (-1, int(part), "") if part.isdecimal() else (RANK.get(part, len(ORDER)), 0, part)
        for part in parts
    ]
