"""A dense model's weights as the start of a mixture of experts.

Follows sparse upcycling (arXiv 2212.05055) and, for experts split along the inner width, virtual groups
(arXiv 2410.07524), with gates that sum to 1, so that the start is the dense model's function [D22].
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.model.parameters import LAYERS, Parameters, initialise
from mhmoe_np.model.room import check_room
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig, parse_model_config


class Experts(NamedTuple):
    """What the dense networks become."""

    num_experts: int
    num_experts_per_tok: int
    split: int = 1  # into how many pieces along the inner width each network is cut
    heads: int = 1  # above 1: an MH-MoE, whose function is another one
    step: int = 2  # every which layer gets experts
    inner_width: int | None = None  # of an MH-MoE's fresh experts; None: the dense network's

    @property
    def keep_function(self) -> bool:
        """Whether the model computes at first what the dense one computes."""
        return self.heads == 1

    @classmethod
    def like(cls, preset: ModelConfig, dense: ModelConfig) -> Experts:
        """A preset's counts, and an inner width in the same ratio to the dense network's.

        Raises UserError: that inner width is no whole number.
        """
        part = Fraction(preset.moe_intermediate_size, preset.intermediate_size)
        inner_width, heads = part * dense.intermediate_size, preset.moe_heads
        if inner_width.denominator > 1:
            raise UserError(
                f"intermediate_size {dense.intermediate_size}: {part} of it, the inner width of each "
                "expert, is no whole number; give --experts, --top-k and --split or --heads instead"
            )
        split, inner = (1, int(inner_width)) if heads > 1 else (part.denominator, None)
        experts, chosen = preset.num_experts, preset.num_experts_per_tok
        return cls(experts, chosen, split, heads, preset.decoder_sparse_step, inner)


def upcycle(
    dense: Parameters, experts: Experts, *, seed: int, on_progress: OnProgress = unseen
) -> Parameters:
    """The parameters of a mixture of experts, every other tensor as it is.

    Gates are renormalised: those of the K chosen experts sum to 1.

    With `split` S = 1 every expert is a copy of its layer's network, and sum_j g_j FFN(x) = FFN(x)
    whatever the router chooses.

    With S > 1 the network is a sum of S pieces, FFN(x) = sum_s P_s(x): piece s has inner features
    s F/S .. (s+1) F/S of gate, up and down. Experts stand in groups of S, one of each piece, and the
    rows of the router are drawn once for each group, so that in a group all probabilities are equal
    and, as K is a multiple of S, whole groups are chosen. A group with the share a of the gates then
    gives each of its pieces the gate a/S, so `down_proj` is multiplied by S:
    sum_groups sum_s (a/S) S P_s(x) = FFN(x). That holds as long as two groups' logits for a token are
    further apart than rounding; training parts the rows of a group from its first step on.

    With H = `heads` > 1 head and merge layer start as the identity and the experts, of sub-token width,
    are fresh: what the layer computed is lost, all else is kept.

    Otherwise a fresh tensor is what `initialise` makes of `seed`. on_progress: counts layers with
    experts.

    Raises UserError: the model has experts; K is 1, where the gate is a probability, or S does not
    divide K, the experts and the inner width, so that the function would change; the pieces would be
    quantised or normed each by itself; or the model does not fit into memory.
    """
    config = _config(dense.config, experts)
    check_room(config, copies=1, source=f"--experts {experts.num_experts}")
    on_progress("drawing", 0, 0)
    made = Parameters(config, dense.flat_P.dtype)
    initialise(made, seed)
    for name, tensor in made.tensors.items():
        if name in dense.tensors:
            tensor[...] = dense.tensors[name]
    for done, layer in enumerate(filter(config.is_moe_layer, range(config.num_hidden_layers)), 1):
        mlp = f"{LAYERS}{layer}.mlp"
        if experts.keep_function:
            _fill_layer(made, dense, mlp, experts)
        else:
            for projection in ("head_proj", "merge_proj"):
                made.tensors[f"{mlp}.{projection}.weight"][...] = np.eye(config.hidden_size)
        on_progress("filling", done, config.moe_layers)
    return made


def _config(dense: ModelConfig, experts: Experts) -> ModelConfig:
    E, K, S, H, step, inner_width = experts
    if dense.num_experts:
        raise UserError(f"num_experts: the model has {dense.num_experts} already; take a dense one")
    if S > 1 and H > 1:
        raise UserError(f"--split {S}: --heads {H} makes fresh experts; leave one of the two out")
    if inner_width and H == 1:
        raise UserError("--inner-width: is of the fresh experts of --heads; elsewhere --split sets it")
    if K == 1 and H == 1:
        raise UserError(
            "--top-k 1: a gate alone is a probability below 1, so the function would change; choose 2"
        )
    if K % S or E % S:
        raise UserError(
            f"--split {S}: must divide --top-k {K} and --experts {E}, so that each token's experts "
            "have every piece equally often"
        )
    if dense.intermediate_size % S:
        raise UserError(f"--split {S}: does not divide intermediate_size {dense.intermediate_size}")
    if S > 1 and (dense.is_quantised or dense.use_sub_norm):
        key = "quantization" if dense.is_quantised else "use_sub_norm"
        raise UserError(
            f"--split {S}: {key} {getattr(dense, key)!r} would scale each piece by itself, which "
            "changes the function; leave --split out"
        )
    if step > dense.num_hidden_layers:
        raise UserError(
            f"--step {step}: the model has {dense.num_hidden_layers} layers, so none would get experts"
        )
    values = dense.model_dump() | {
        "num_experts": E,
        "num_experts_per_tok": K,
        "moe_intermediate_size": inner_width or dense.intermediate_size // S,
        "decoder_sparse_step": step,
        "moe_heads": H,
        "moe_head_layer": H > 1,
        "moe_merge_layer": H > 1,
        "norm_topk_prob": K > 1,
    }
    return parse_model_config(values, source="upcycled")


def _fill_layer(made: Parameters, dense: Parameters, mlp: str, experts: Experts) -> None:
    S, F = experts.split, made.config.moe_intermediate_size
    router_EU = made.tensors[f"{mlp}.gate.weight"]
    for e in range(experts.num_experts):
        router_EU[e] = router_EU[e - e % S]
        piece = slice(e % S * F, (e % S + 1) * F)
        for name in ("gate_proj", "up_proj"):
            made.tensors[f"{mlp}.experts.{e}.{name}.weight"][...] = dense.tensors[
                f"{mlp}.{name}.weight"
            ][piece]
        down_DF = dense.tensors[f"{mlp}.down_proj.weight"][:, piece]
        made.tensors[f"{mlp}.experts.{e}.down_proj.weight"][...] = S * down_DF
        if made.config.use_sub_norm:
            norm_F = dense.tensors[f"{mlp}.ffn_sub_norm.weight"]
            made.tensors[f"{mlp}.experts.{e}.ffn_sub_norm.weight"][...] = norm_F
