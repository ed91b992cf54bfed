"""An MH-MoE language model (Multi-Head Mixture-of-Experts, arXiv 2411.16205) in PyTorch, to be read.

The mathematics of mhmoe-np's SPECIFICATION.md, for AutoModelForCausalLM with trust_remote_code; the
tensors have the names of its section 1. Array names end in their axes:

    B sequences      T positions     N tokens, B*T      D model width      V vocabulary
    A attention heads                G key/value heads  C width of one attention head
    H MoE heads      M sub-tokens, N*H                  U sub-token width, D/H
    E experts        K experts chosen for each sub-token
    I, O             input and output width of a linear map

Departs from the specification in one point: a capacity drops nothing, as in its evaluation. Generation
keeps no keys and values: each new token costs a whole forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mhmoe import MhMoeConfig

IGNORED = -100  # a label that is not counted
UNSUPPORTED = ("inputs_embeds", "position_ids", "past_key_values", "cache")
HEAD_GAIN, MERGE_GAIN = 0.5**0.5, 1.0  # of Xavier's distribution (section 6)


@dataclass
class MhMoeOutput(ModelOutput):
    """What a forward pass comes to; the losses only where labels were given."""

    loss: Tensor | None = None  # nll, and the two sums below times their coefficients
    logits: Tensor | None = None  # [B, T, V]
    nll: Tensor | None = None  # mean over the labels that count
    aux_loss: Tensor | None = None  # balance loss, summed over layers
    z_loss: Tensor | None = None  # summed over layers
    router_logits: tuple[Tensor, ...] | None = None  # [M, E] of each layer with experts


# ---- BitNet (section 5) ---------------------------------------------------------------------------


def quantise_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit integers, and the largest magnitude of each row."""
    gamma_N1 = x_NI.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    q_NI = torch.round(x_NI * (127 / gamma_N1)).clamp(-128, 127)  # half to even
    return q_NI, gamma_N1


def quantise_weight(weight_OI: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """A matrix of -1, 0, 1 (bitnet_b158) or -1, 1 (bitnet), and its scale."""
    beta = weight_OI.abs().mean().clamp(min=1e-5)
    if quantization == "bitnet_b158":
        return torch.round(weight_OI * (1 / beta)).clamp(-1, 1), beta
    sign_OI = torch.where(weight_OI - weight_OI.mean() > 0, 1.0, -1.0)
    return sign_OI.to(weight_OI.dtype), beta


class BitProduct(torch.autograd.Function):
    """A product of quantised rows and a quantised matrix, whose gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, quantization: str) -> Tensor:
        """y = (q @ w.T) * (beta * (gamma / 127))."""
        q_NI, gamma_N1 = quantise_rows(x_NI)
        w_OI, beta = quantise_weight(weight_OI, quantization)
        ctx.save_for_backward(q_NI, gamma_N1, w_OI, beta)
        return (q_NI @ w_OI.T) * (beta * (gamma_N1 / 127))

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = dy @ (beta * w), dW = dy.T @ (q * gamma / 127)."""
        q_NI, gamma_N1, w_OI, beta = ctx.saved_tensors
        return dy_NO @ (beta * w_OI), dy_NO.T @ (q_NI * gamma_N1 / 127), None


class Linear(nn.Linear):
    """y = x @ W.T + b, quantised unless quantization is "none".

    gain: of the distribution that W starts with, if it is Xavier's.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        quantization: str,
        *,
        bias: bool = False,
        gain: float | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.quantization, self.gain = quantization, gain

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if self.quantization == "none":
            return super().forward(x)
        rows_NI = x.reshape(-1, self.in_features)
        y = BitProduct.apply(rows_NI, self.weight, self.quantization)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


# ---- backbone (section 2) -------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


def rotate(x_BTAC: Tensor, position_BT: Tensor, theta: float) -> Tensor:
    """Rotary positions: feature j of the first half of C pairs with feature j of the second."""
    C = x_BTAC.shape[-1]
    j = torch.arange(C // 2, dtype=torch.float64, device=x_BTAC.device)
    angle = position_BT[:, :, None, None] * theta ** (-2 * j / C)  # [B, T, 1, C/2]
    cos, sin = angle.cos().to(x_BTAC.dtype), angle.sin().to(x_BTAC.dtype)
    first, second = x_BTAC.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: MhMoeConfig) -> None:
        super().__init__()
        D, C, quantization = config.hidden_size, config.head_dim, config.quantization
        A, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rope_theta, self.group = C, config.rope_theta, A // G
        self.q_proj = Linear(D, A * C, quantization)
        self.k_proj = Linear(D, G * C, quantization)
        self.v_proj = Linear(D, G * C, quantization)
        self.o_proj = Linear(A * C, D, quantization)
        if config.use_sub_norm:
            self.attn_sub_norm = RMSNorm(A * C, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, position_BT: Tensor, seen_B1TT: Tensor) -> Tensor:
        """seen_B1TT: whether a position sees another."""
        B, T, _ = x_BTD.shape
        q_BTAC = self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        k_BTGC = self.k_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        v_BTGC = self.v_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        q_BTAC = rotate(q_BTAC, position_BT, self.rope_theta)
        k_BTGC = rotate(k_BTGC, position_BT, self.rope_theta)
        # Attention head a reads key/value head a // group.
        k_BTAC = k_BTGC.repeat_interleave(self.group, dim=2)
        v_BTAC = v_BTGC.repeat_interleave(self.group, dim=2)
        y_BATC = functional.scaled_dot_product_attention(  # softmax(q k^T / sqrt(C)) v
            q_BTAC.transpose(1, 2), k_BTAC.transpose(1, 2), v_BTAC.transpose(1, 2), attn_mask=seen_B1TT
        )
        y = y_BATC.transpose(1, 2).reshape(B, T, -1)
        if hasattr(self, "attn_sub_norm"):
            y = self.attn_sub_norm(y)
        return self.o_proj(y)


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)): a dense layer, one expert and the shared expert alike."""

    def __init__(self, config: MhMoeConfig, width: int, inner: int) -> None:
        super().__init__()
        self.act = config.hidden_act
        self.gate_proj = Linear(width, inner, config.quantization)
        self.up_proj = Linear(width, inner, config.quantization)
        self.down_proj = Linear(inner, width, config.quantization)
        if config.use_sub_norm:
            self.ffn_sub_norm = RMSNorm(inner, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        gate = self.gate_proj(x)
        act = functional.silu(gate) if self.act == "silu" else functional.relu(gate).square()
        y = act * self.up_proj(x)
        if hasattr(self, "ffn_sub_norm"):
            y = self.ffn_sub_norm(y)
        return self.down_proj(y)


# ---- the MH-MoE layer (section 3) -----------------------------------------------------------------


class MhMoe(nn.Module):
    """Head layer, split into sub-tokens, experts for each, join, merge layer [P1 eq. 1-4]."""

    def __init__(self, config: MhMoeConfig) -> None:
        super().__init__()
        D, E, H = config.hidden_size, config.num_experts, config.moe_heads
        self.config, self.width = config, D // H
        projections = config.quantization if config.quantize_moe_projections else "none"
        if config.moe_head_layer:
            self.head_proj = Linear(D, D, projections, bias=config.moe_projection_bias, gain=HEAD_GAIN)
        self.gate = Linear(self.width, E, "none")  # the router
        self.experts = nn.ModuleList(
            FeedForward(config, self.width, config.moe_intermediate_size) for _ in range(E)
        )
        if config.moe_merge_layer:
            self.merge_proj = Linear(
                D, D, projections, bias=config.moe_projection_bias, gain=MERGE_GAIN
            )
        if config.shared_expert_intermediate_size:
            self.shared_expert = FeedForward(config, D, config.shared_expert_intermediate_size)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the router's logits [M, E]."""
        hat_ND = self.head_proj(x_ND) if self.config.moe_head_layer else x_ND
        x_MU = hat_ND.reshape(-1, self.width)  # row n*H + h holds features h*U .. (h+1)*U of token n
        logits_ME = self.gate(x_MU)
        gate_MK, expert_MK = self.route(logits_ME)
        y_MU = torch.zeros_like(x_MU)
        for e, expert in enumerate(self.experts):
            row, choice = torch.where(expert_MK == e)
            if len(row):
                y_MU = y_MU.index_add(0, row, gate_MK[row, choice, None] * expert(x_MU[row]))
        if self.config.moe_residual:
            y_MU = y_MU + x_MU
        y_ND = y_MU.reshape(x_ND.shape)
        if self.config.moe_merge_layer:
            y_ND = self.merge_proj(y_ND)
        if self.config.shared_expert_intermediate_size:
            y_ND = y_ND + self.shared_expert(x_ND)  # of whole tokens, outside head and merge layer
        return y_ND, logits_ME

    def route(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and indices of the K most probable experts, [M, K] each."""
        p_ME = probabilities(logits_ME)
        # A stable sort: of equal probabilities the lower index comes first.
        sorted_ME, expert_ME = torch.sort(p_ME, dim=-1, descending=True, stable=True)
        K = self.config.num_experts_per_tok
        gate_MK, expert_MK = sorted_ME[:, :K], expert_ME[:, :K]
        if self.config.norm_topk_prob:
            gate_MK = gate_MK / gate_MK.sum(dim=-1, keepdim=True)
        return gate_MK.to(logits_ME.dtype), expert_MK


def probabilities(logits_ME: Tensor) -> Tensor:
    """softmax(logits), in float32 at least."""
    return torch.softmax(logits_ME, -1, torch.promote_types(logits_ME.dtype, torch.float32))


# ---- the router's losses (section 4) --------------------------------------------------------------


def balance_loss(logits_ME: Tensor, config: MhMoeConfig) -> Tensor:
    """E * sum_e f_e * mean p_e; f_e is e's share of first choices, or of all ("topk")."""
    E, p_ME = config.num_experts, probabilities(logits_ME)
    choices = config.num_experts_per_tok if config.router_aux_loss_type == "topk" else 1
    expert = torch.sort(p_ME, dim=-1, descending=True, stable=True).indices[:, :choices]
    f_E = torch.bincount(expert.flatten(), minlength=E).to(p_ME.dtype) / expert.numel()
    return E * (f_E * p_ME.mean(dim=0)).sum()


def z_loss(logits_ME: Tensor) -> Tensor:
    """mean logsumexp(logits)^2."""
    return torch.logsumexp(logits_ME, dim=-1).square().mean()


# ---- the model ------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: MhMoeConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = MhMoe(config) if self.is_moe else FeedForward(config, D, config.intermediate_size)

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, seen_B1TT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the router's logits where there is one."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), position_BT, seen_B1TT)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if not self.is_moe:
            return x_BTD + self.mlp(normed_BTD), None
        y_ND, logits_ME = self.mlp(normed_BTD.flatten(0, 1))
        return x_BTD + y_ND.reshape(x_BTD.shape), logits_ME


class MhMoePreTrainedModel(PreTrainedModel):
    """What the two classes below share."""

    config_class = MhMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """The distributions of section 6."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            gain = getattr(module, "gain", None)
            if gain is None:
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None and gain == MERGE_GAIN:
                nn.init.zeros_(module.bias)
            elif module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)


class MhMoeModel(MhMoePreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: MhMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states [B, T, D], and the logits [M, E] of every router.

        attention_mask: [B, T], 0 for padding, which nothing else sees; None: there is none.
        """
        B, T = input_ids.shape
        seen_B1TT = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        position_BT = torch.arange(T, device=input_ids.device)[None].expand(B, T)
        if attention_mask is not None:
            is_token_BT = attention_mask.bool()
            itself = torch.eye(T, dtype=torch.bool, device=input_ids.device)
            seen_B1TT = seen_B1TT & (is_token_BT[:, None, None, :] | itself)
            position_BT = (is_token_BT.cumsum(dim=1) - 1).clamp(min=0)
        x_BTD = self.embed_tokens(input_ids)
        router_logits = []
        for block in self.layers:
            x_BTD, logits_ME = block(x_BTD, position_BT, seen_B1TT)
            if logits_ME is not None:
                router_logits.append(logits_ME)
        return self.norm(x_BTD), tuple(router_logits)


class MhMoeForCausalLM(MhMoePreTrainedModel, GenerationMixin):
    """The model with its output head: logits, and with labels the loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = False  # the loss is a mean over this batch, whatever a Trainer accumulates

    def __init__(self, config: MhMoeConfig) -> None:
        super().__init__(config)
        self.model = MhMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """Everything anew for each token."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> MhMoeOutput:
        """Logits [B, T, V]; with labels [B, T] the losses.

        labels: position t predicts label t+1; -100 is counted neither in the mean nor in any statistic
        of the routers. `labels=input_ids` gives what `mhmoe-np trace` gives for these tokens.
        others: what transformers passes to any model; what would change the result is refused.
        """
        for name in UNSUPPORTED:
            if others.get(name) is not None:
                raise ValueError(f"{name}: not supported by MhMoeForCausalLM")
        x_BTD, router_logits = self.model(input_ids, attention_mask)
        logits_BTV = self.lm_head(x_BTD)
        if labels is None:
            return MhMoeOutput(logits=logits_BTV, router_logits=router_logits)
        target_BT = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        nll = functional.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED
        )
        counted_M = (target_BT.flatten() != IGNORED).repeat_interleave(self.config.moe_heads)
        counted = [logits_ME[counted_M] for logits_ME in router_logits]
        aux = sum((balance_loss(logits_ME, self.config) for logits_ME in counted), nll.new_zeros(()))
        z = sum((z_loss(logits_ME) for logits_ME in counted), nll.new_zeros(()))
        loss = nll + self.config.router_aux_loss_coef * aux + self.config.router_z_loss_coef * z
        return MhMoeOutput(loss, logits_BTV, nll, aux, z, router_logits)
