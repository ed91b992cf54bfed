from __future__ import annotations

import pytest

from mhmoe_np.costs.parity import moe_layer_macs
from mhmoe_np.settings.presets import MODEL_PRESETS, PAPER_MODELS


def test_the_ten_names():
    assert PAPER_MODELS == ("dense", "smoe", "fine-grained-smoe", "mh-moe-2", "mh-moe-3")
    assert list(MODEL_PRESETS) == [
        f"{family}-{name}" for family in ("paper", "small") for name in PAPER_MODELS
    ]


@pytest.mark.parametrize(("family", "macs"), [("paper", 4_718_592), ("small", 4_718_592 // 16)])
def test_a_family_costs_the_same_multiply_adds_a_token(family, macs):
    assert {moe_layer_macs(MODEL_PRESETS[f"{family}-{name}"]) for name in PAPER_MODELS} == {macs}


@pytest.mark.parametrize(
    ("family", "backbone"),
    [("paper", (768, 12, 12, 32000, 2048, 2048)), ("small", (192, 4, 4, 4096, 512, 256))],
)
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_a_family_shares_its_backbone(family, backbone, name):
    config = MODEL_PRESETS[f"{family}-{name}"]
    assert backbone == (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.vocab_size,
        config.intermediate_size,
        config.max_position_embeddings,
    )
    assert config.tie_word_embeddings
    # P1 section 3: every second layer has experts.
    expected = [name != "dense" and layer % 2 == 1 for layer in range(config.num_hidden_layers)]
    assert [config.is_moe_layer(layer) for layer in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("name", "heads", "experts", "top_k", "paper_inner", "small_inner"),
    [
        ("dense", 1, 0, 0, 0, 0),
        ("smoe", 1, 8, 1, 2048, 512),
        ("fine-grained-smoe", 1, 16, 2, 1024, 256),
        ("mh-moe-2", 2, 40, 2, 768, 192),
        ("mh-moe-3", 3, 96, 3, 512, 128),
    ],
)
def test_experts_are_those_of_the_paper(name, heads, experts, top_k, paper_inner, small_inner):
    # [P1 section 3], [spec 7 Paper configs]
    for family, inner in (("paper", paper_inner), ("small", small_inner)):
        config = MODEL_PRESETS[f"{family}-{name}"]
        assert (config.moe_heads, config.num_experts, config.num_experts_per_tok) == (
            heads,
            experts,
            top_k,
        )
        assert config.moe_intermediate_size == inner
        assert config.moe_head_layer == config.moe_merge_layer == (heads > 1)
        assert config.norm_topk_prob == (top_k > 1)
