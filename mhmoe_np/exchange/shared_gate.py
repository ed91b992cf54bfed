"""Qwen2-MoE's shared expert stands behind a gate, sigmoid(x @ g); ours has none [D2].

With g = 0 the gate is one half whatever x is. So an ungated shared expert is one with that gate and
twice its down_proj, exactly: a factor of 2 rounds nothing. A layer without a shared expert has one of
width 0.
"""

from __future__ import annotations

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.exchange.hf_files import StoredTensor
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray


def shared_down_names(config: ModelConfig) -> list[str]:
    """The tensors that are twice as large there."""
    if not config.shared_expert_intermediate_size:
        return []
    return [f"{prefix}.shared_expert.down_proj.weight" for prefix in _moe_layers(config)]


def gate_tensors(config: ModelConfig) -> dict[str, FloatArray]:
    """What the class has besides our tensors: gates of 0, and shared experts of width 0 for none."""
    D = config.hidden_size
    shapes: dict[str, tuple[int, int]] = {}
    for prefix in _moe_layers(config):
        shapes[f"{prefix}.shared_expert_gate.weight"] = (1, D)
        if not config.shared_expert_intermediate_size:
            shapes[f"{prefix}.shared_expert.gate_proj.weight"] = (0, D)
            shapes[f"{prefix}.shared_expert.up_proj.weight"] = (0, D)
            shapes[f"{prefix}.shared_expert.down_proj.weight"] = (D, 0)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def check_gate(stored: StoredTensor, config: ModelConfig, *, source: str) -> None:
    """Make sure that a gate is one half for every token, or gates a shared expert of width 0.

    Raises UserError: it is neither; the line names it.
    """
    if config.shared_expert_intermediate_size and stored.read().any():
        raise UserError(
            f"{source}: tensor {stored.name!r} gates the shared expert by the token, which cannot be "
            "expressed; only a gate of zeros can"
        )


def _moe_layers(config: ModelConfig) -> list[str]:
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{layer}.mlp" for layer in layers if config.is_moe_layer(layer)]
