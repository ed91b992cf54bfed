"""Where llama.cpp keeps what we have: tensor names, and the order of the rows of q and k.

Source   llama.cpp's `gguf-py/gguf/constants.py` (names), `convert_hf_to_gguf.py` (order of rows) and
         `llama_model_rope_type` (which architectures rotate neighbours)
"""

from __future__ import annotations

import re

from mhmoe_np.types import FloatArray

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
FEED_FORWARD = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SUB_NORMS = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
ROUTER = {"ffn_gate_inp": "mlp.gate"}
LAYER = {
    "llama": ATTENTION | FEED_FORWARD | ROUTER,
    "bitnet": ATTENTION | FEED_FORWARD | SUB_NORMS,
}
"""Architecture -> its names of a layer's tensors, and ours."""
EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
TURNED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def turns_neighbours(architecture: str) -> bool:
    """Whether its rotary positions turn features 2j and 2j+1 of a head together, not j and j + C/2."""
    return architecture == "llama"


def our_name(name: str, architecture: str) -> str | None:
    """Our name of a tensor; None: we have none such.

    Of experts, stacked in one tensor (`blk.0.ffn_gate_exps.weight`) or apart, as older files have them
    (`blk.0.ffn_gate.3.weight`), with `{e}` in the place of the expert's number or with the number.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    found = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+?)(_exps|\.(?:0|[1-9]\d*))?\.weight", name)
    if not found:
        return None
    layer, kind, experts = found.groups()
    prefix = f"model.layers.{layer}"
    if not experts:
        ours = LAYER[architecture].get(kind)
        return f"{prefix}.{ours}.weight" if ours else None
    if architecture != "llama" or kind not in EXPERTS:
        return None
    expert = "{e}" if experts == "_exps" else experts[1:]
    return f"{prefix}.mlp.experts.{expert}.{EXPERTS[kind]}.weight"


def neighbours_turned(w_OI: FloatArray, heads: int) -> FloatArray:
    """Rows of q or k in the order for rotary positions that turn neighbours, from ours.

    Of each head, feature j of the first half becomes 2j and of the second half 2j + 1.
    """
    O, I = w_OI.shape
    return w_OI.reshape(heads, 2, O // heads // 2, I).swapaxes(1, 2).reshape(O, I)


def halves_turned(w_OI: FloatArray, heads: int) -> FloatArray:
    """Rows of q or k in our order, from that for rotary positions that turn neighbours."""
    O, I = w_OI.shape
    return w_OI.reshape(heads, O // heads // 2, 2, I).swapaxes(1, 2).reshape(O, I)
