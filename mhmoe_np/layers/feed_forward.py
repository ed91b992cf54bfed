"""The dense feed-forward layer, also used as the shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_np.operations.table import LayerWeights, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

DENSE = "mlp"
SHARED_EXPERT = "mlp.shared_expert"


class FeedForwardCache(NamedTuple):
    """What the backward needs of the forward."""

    x_ND: FloatArray
    gate_up_N2F: FloatArray
    h_NF: FloatArray
    normed_NF: FloatArray  # what the way down saw
    rstd_N: FloatArray | None


def feed_forward_forward(
    x_ND: FloatArray,
    w: LayerWeights,
    prefix: str,
    *,
    config: ModelConfig,
    ops: Operations,
) -> tuple[FloatArray, FeedForwardCache]:
    r"""y = down(norm(act(gate(x)) * up(x))), the norm only with `use_sub_norm`.

    The weights are w[prefix + ...]. As the shared expert it is added to the MoE layer's output [D2].

    Equation y = W^{\mathrm{down}}\, \mathrm{norm}\left( \mathrm{act}( W^{\mathrm{gate}} x ) \odot
               W^{\mathrm{up}} x \right)
    Shapes   x_ND -> y_ND
    Source   [spec 2 FFN], [GLU eq. 6], [spec 3 SharedExpert]
    """
    gate_up_N2F = ops.linear(x_ND, w[f"{prefix}.gate_up_proj.weight"], None)
    h_NF = ops.gated_activation(gate_up_N2F, activation=config.hidden_act)
    normed_NF, rstd_N = h_NF, None
    if config.use_sub_norm:
        sub_norm_F = w[f"{prefix}.ffn_sub_norm.weight"]
        normed_NF, rstd_N = ops.rms_norm(h_NF, sub_norm_F, eps=config.rms_norm_eps)
    # GLU eq. 6: FFN(x) = (act(x W) * x V) W2
    y_ND = ops.linear(normed_NF, w[f"{prefix}.down_proj.weight"], None)
    return y_ND, FeedForwardCache(x_ND, gate_up_N2F, h_NF, normed_NF, rstd_N)


def feed_forward_backward(
    dy_ND: FloatArray,
    cache: FeedForwardCache,
    w: LayerWeights,
    dw: Mapping[str, FloatArray],
    prefix: str,
    *,
    config: ModelConfig,
    ops: Operations,
) -> FloatArray:
    """Return dx_ND; add to dw.

    Shapes   dy_ND, cache -> dx_ND
    Source   [spec 2 FFN]
    """
    down, gate_up = f"{prefix}.down_proj.weight", f"{prefix}.gate_up_proj.weight"
    dh_NF = ops.linear_backward(dy_ND, cache.normed_NF, w[down], dw[down], None)
    if cache.rstd_N is not None:
        norm = f"{prefix}.ffn_sub_norm.weight"
        dh_NF = ops.rms_norm_backward(dh_NF, cache.h_NF, w[norm], cache.rstd_N, dw[norm])
    dgate_up_N2F = ops.gated_activation_backward(dh_NF, cache.gate_up_N2F, activation=config.hidden_act)
    return ops.linear_backward(dgate_up_N2F, cache.x_ND, w[gate_up], dw[gate_up], None)
