"""The parameter table's tensors and how they start."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.settings.model import ModelConfig

D, E, F = 48, 3, 40
CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 300,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_experts": E,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": F,
        "moe_heads": 2,
        "moe_projection_bias": True,
        "use_sub_norm": True,
        "shared_expert_intermediate_size": 56,
        "tie_word_embeddings": False,
    }
)


def started(seed: int, config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    parameters = Parameters(config, np.float64)
    initialise(parameters, seed)
    return parameters.tensors


def test_every_tensor_starts_from_its_distribution() -> None:
    # [spec 6 initialisation], [R1]
    for name, tensor in started(0).items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif name == "model.embed_tokens.weight":
            assert tensor.std() == pytest.approx(D**-0.5, rel=0.02)
            assert abs(tensor.mean()) < 4 * D**-0.5 / tensor.size**0.5
        elif name.endswith("merge_proj.bias"):
            assert (tensor == 0).all()
        else:
            # Xavier: gain * sqrt(6 / (in + out)), of D and D; every other linear: 1/sqrt(in).
            xavier = (6 / (2 * D)) ** 0.5
            bound = {"head_proj.weight": xavier * 0.5**0.5, "merge_proj.weight": xavier}.get(
                ".".join(name.split(".")[-2:]), tensor.shape[-1] ** -0.5
            )
            # Uniform in +-bound: the largest of n magnitudes lies within about 1/n of it.
            assert bound * (1 - 8 / tensor.size) < np.abs(tensor).max() <= bound, name
            assert tensor.size < 1000 or tensor.std() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_a_tensor_depends_on_the_seed_and_its_name_alone() -> None:
    first, again, other = started(7), started(7), started(8)
    larger = started(7, CONFIG.model_copy(update={"num_hidden_layers": 4}))
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name])
        np.testing.assert_array_equal(tensor, larger[name])
        assert ("norm" in name or "merge_proj.bias" in name) == np.array_equal(tensor, other[name])


def test_the_tensors_are_those_of_the_specification() -> None:
    # [spec 1 tensor names]
    tensors = {re.sub(r"^model\.layers\.1\.", "1.", name): t.shape for name, t in started(0).items()}
    expected = {
        "model.embed_tokens.weight": (300, D),
        "1.input_layernorm.weight": (D,),
        "1.self_attn.q_proj.weight": (D, D),
        "1.self_attn.k_proj.weight": (D, D),
        "1.self_attn.v_proj.weight": (D, D),
        "1.self_attn.attn_sub_norm.weight": (D,),
        "1.self_attn.o_proj.weight": (D, D),
        "1.post_attention_layernorm.weight": (D,),
        "1.mlp.gate.weight": (E, D // 2),
        "1.mlp.head_proj.weight": (D, D),
        "1.mlp.head_proj.bias": (D,),
        "1.mlp.merge_proj.weight": (D, D),
        "1.mlp.merge_proj.bias": (D,),
        "1.mlp.shared_expert.gate_proj.weight": (56, D),
        "1.mlp.shared_expert.up_proj.weight": (56, D),
        "1.mlp.shared_expert.down_proj.weight": (D, 56),
        "1.mlp.shared_expert.ffn_sub_norm.weight": (56,),
        "model.norm.weight": (D,),
        "lm_head.weight": (300, D),
    }
    for e in range(E):
        expected |= {
            f"1.mlp.experts.{e}.gate_proj.weight": (F, D // 2),
            f"1.mlp.experts.{e}.up_proj.weight": (F, D // 2),
            f"1.mlp.experts.{e}.down_proj.weight": (D // 2, F),
            f"1.mlp.experts.{e}.ffn_sub_norm.weight": (F,),
        }
    assert {name: shape for name, shape in tensors.items() if "layers.0" not in name} == expected
