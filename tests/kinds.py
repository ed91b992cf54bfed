"""Small models of every kind, for tests that must hold for all of them."""

from __future__ import annotations

from typing import Any

BASE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
}
SMOE = {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 14}
FINE = SMOE | {"num_experts_per_tok": 2, "decoder_sparse_step": 1}
MH2 = FINE | {"moe_heads": 2}
MH3 = FINE | {"moe_heads": 3, "num_experts_per_tok": 3}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-grouped-heads": {"num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500.0},
    "dense-relu2-sub-norm-untied": {
        "hidden_act": "relu2",
        "use_sub_norm": True,
        "tie_word_embeddings": False,
    },
    "smoe": SMOE,
    "smoe-every-layer": SMOE | {"decoder_sparse_step": 1},
    "smoe-head-and-merge": SMOE | {"moe_head_layer": True, "moe_merge_layer": True},
    "fine-grained": FINE,
    "all-experts": FINE | {"num_experts_per_tok": 5},
    "one-expert": SMOE | {"num_experts": 1},
    "mh2": MH2,
    "mh3": MH3,
    "mh2-bias": MH2 | {"moe_projection_bias": True},
    "mh2-raw-gates": MH2 | {"norm_topk_prob": False},
    "mh2-no-head": MH2 | {"moe_head_layer": False},
    "mh2-no-merge": MH2 | {"moe_merge_layer": False},
    "mh2-neither": MH2 | {"moe_head_layer": False, "moe_merge_layer": False},
    "mh2-shared": MH2 | {"shared_expert_intermediate_size": 18},
    "mh3-shared-sub-norm": MH3 | {"shared_expert_intermediate_size": 18, "use_sub_norm": True},
    "mh2-capacity": MH2 | {"moe_capacity_factor": 0.6},
    "mh3-capacity-raw": MH3 | {"moe_capacity_factor": 0.9, "norm_topk_prob": False},
    "mh2-topk-balance": MH2 | {"router_aux_loss_type": "topk", "router_aux_loss_coef": 0.3},
    "mh2-z-loss": MH2 | {"router_z_loss_coef": 0.2},
}


def settings(kind: str) -> dict[str, Any]:
    """The config.json of a kind, as a user would write it: defaults left out."""
    return {**BASE, **KINDS[kind]}
