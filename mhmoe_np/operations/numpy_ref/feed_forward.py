"""The gated activation of SwiGLU and of its squared-ReLU sibling."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.table import Activation
from mhmoe_np.types import FloatArray


def sigmoid(z_NF: FloatArray) -> FloatArray:
    """1 / (1 + exp(-z)), by exponentials that cannot overflow, in float64.

    Shapes   z_NF -> [N, F]
    Source   [GLU eq. 5]
    """
    e_NF = np.exp(-np.abs(z_NF, dtype=np.float64))
    return (np.where(z_NF < 0, e_NF, 1) / (1 + e_NF)).astype(z_NF.dtype)


def gated_activation(gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
    """See `Operations.gated_activation`."""
    gate_NF, up_NF = np.split(gate_up_N2F, 2, axis=1)
    if activation == "silu":
        return gate_NF * sigmoid(gate_NF) * up_NF  # GLU eq. 5: Swish(x W) * x V
    return np.maximum(gate_NF, 0) ** 2 * up_NF


def gated_activation_backward(
    dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
) -> FloatArray:
    """See `Operations.gated_activation_backward`.

    h = act(g) u, hence dg = dh u act'(g) and du = dh act(g).
    silu'(g) = s + g s (1 - s) with s = sigmoid(g);  relu2'(g) = 2 max(g, 0).
    """
    gate_NF, up_NF = np.split(gate_up_N2F, 2, axis=1)
    if activation == "silu":
        s_NF = sigmoid(gate_NF)
        act_NF = gate_NF * s_NF
        slope_NF = s_NF + act_NF * (1 - s_NF)
    else:
        act_NF = np.maximum(gate_NF, 0) ** 2
        slope_NF = 2 * np.maximum(gate_NF, 0)
    return np.concatenate([dh_NF * up_NF * slope_NF, dh_NF * act_NF], axis=1)
