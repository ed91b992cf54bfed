"""The configuration of an MH-MoE language model (arXiv 2411.16205), for transformers.

Keys and defaults are those of mhmoe-np's SPECIFICATION.md, section 1; so is this file's sibling,
modeling_mhmoe.py.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MhMoeConfig(PretrainedConfig):
    """Dense, SMoE, fine-grained SMoE and MH-MoE models, in float or with BitNet's weights.

    Letters in the comments: D model width, F inner width of a feed-forward network, E experts, K
    experts chosen for each sub-token, H MoE heads.
    """

    model_type = "mhmoe"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,  # D
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,  # None: as many as attention heads
        head_dim: int | None = None,  # None: hidden_size / num_attention_heads
        intermediate_size: int = 2048,  # F of a layer without experts
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        hidden_act: str = "silu",  # or "relu2"
        num_experts: int = 0,  # E; 0: a dense model
        num_experts_per_tok: int = 0,  # K
        moe_intermediate_size: int = 0,  # F of one expert
        decoder_sparse_step: int = 2,  # layer i (from 0) has experts iff (i + 1) % step == 0
        moe_heads: int = 1,  # H
        moe_head_layer: bool | None = None,  # None: iff H > 1
        moe_merge_layer: bool | None = None,  # None: iff H > 1
        moe_projection_bias: bool = False,
        moe_residual: bool = False,
        norm_topk_prob: bool | None = None,  # None: iff K > 1
        moe_capacity_factor: float | None = None,  # of training in mhmoe-np; nothing is dropped here
        shared_expert_intermediate_size: int = 0,
        router_aux_loss_type: str = "top1",  # or "topk"
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.0,
        quantization: str = "none",  # or "bitnet_b158" (ternary), "bitnet" (1-bit sign)
        use_sub_norm: bool | None = None,  # None: iff quantised
        quantize_moe_projections: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        """Every key of the model; `kwargs` are those of any PretrainedConfig."""
        several_heads, quantised = moe_heads > 1, quantization != "none"
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.decoder_sparse_step = decoder_sparse_step
        self.moe_heads = moe_heads
        self.moe_head_layer = several_heads if moe_head_layer is None else moe_head_layer
        self.moe_merge_layer = several_heads if moe_merge_layer is None else moe_merge_layer
        self.moe_projection_bias = moe_projection_bias
        self.moe_residual = moe_residual
        self.norm_topk_prob = num_experts_per_tok > 1 if norm_topk_prob is None else norm_topk_prob
        self.moe_capacity_factor = moe_capacity_factor
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router_aux_loss_type = router_aux_loss_type
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.quantization = quantization
        self.use_sub_norm = quantised if use_sub_norm is None else use_sub_norm
        self.quantize_moe_projections = quantize_moe_projections
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts."""
        return self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
