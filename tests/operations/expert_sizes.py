"""How far rounding may carry two computations of the experts apart, entry by entry.

First order: an error in a number passes on times the derivative of what is computed from it. All is in
units of one rounding; a name that starts with `d` is a gradient, one in `_size` its error. The rows are
those of the dispatch, R.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.operations.numpy_ref.feed_forward import sigmoid
from mhmoe_np.operations.numpy_ref.quantise import quantise_rows
from mhmoe_np.operations.table import BitWeight, Dispatch, ExpertCache


def _acting(weight: Any) -> Any:
    return weight.w * weight.beta[..., None] if isinstance(weight, BitWeight) else weight


def _quantised(x: Any) -> Any:
    q, scale = quantise_rows(x)
    return q * scale[:, None]


class ExpertSizes:
    """Of one call of `expert_ffn` and its backward.

    cache: the definition's. Quantised weights: both backends quantise to the same integers.
    """

    def __init__(
        self,
        x_MU: Any,
        gate_MK: Any,
        sent: Dispatch,
        gate_up: Any,
        down: Any,
        sub_norm_EF: Any,
        cache: ExpertCache,
        activation: str,
    ) -> None:
        self.shape, (self.route, _, start) = gate_MK.shape, sent
        self.expert = np.repeat(np.arange(len(start) - 1), np.diff(start))
        self.token = self.route // gate_MK.shape[1]
        self.gate = np.abs(gate_MK.ravel()[self.route])[:, None]
        quantised = isinstance(gate_up, BitWeight)
        self.x = np.abs(_quantised(x_MU) if quantised else x_MU)[self.token]
        self.gate_up, self.down = np.abs(_acting(gate_up)), np.abs(_acting(down))

        g, u = np.split(cache.gate_up_R2F.astype(float), 2, axis=1)
        self.gate_up_size = np.einsum("ru,rfu->rf", self.x, self.gate_up[self.expert])
        self.g_size, self.u_size = np.split(self.gate_up_size, 2, axis=1)
        if activation == "silu":
            s = sigmoid(g)
            act, slope, self.bend = g * s, np.abs(s + g * s * (1 - s)), 0.5
        else:
            act, slope, self.bend = np.maximum(g, 0) ** 2, 2 * np.maximum(g, 0), 2.0
        self.act, self.slope, self.u = np.abs(act), slope, np.abs(u)
        h = np.abs(act * u)
        h_size = slope * self.g_size * self.u + self.act * self.u_size

        # n = h r w: r is off by a share of r^2 mean(h h_size).
        self.norm = None if sub_norm_EF is None else np.abs(sub_norm_EF)[self.expert]
        self.r = 1.0 if cache.rstd_R is None else cache.rstd_R.astype(float)[:, None]
        self.rstd_size = 1 + self.r**2 * (h * h_size).mean(axis=1, keepdims=True)
        self.hat, hat_size = h * self.r, h_size * self.r
        if self.norm is not None:
            hat_size = hat_size + self.hat * self.rstd_size
        self.hat_size = hat_size
        w = 1.0 if self.norm is None else self.norm
        self.n, self.n_size = self.hat * w, self.hat_size * w
        if quantised:  # its scale is off as the row's largest number is
            self.n = self.n.max(axis=1, keepdims=True) + 0 * self.n
            self.n_size = self.n_size.max(axis=1, keepdims=True) + 0 * self.n_size

    def forward(self) -> tuple[Any, Any, Any]:
        """Of y, and of the cache."""
        y_RU = np.einsum("rf,ruf->ru", self.n_size, self.down[self.expert])
        rstd = None if self.norm is None else self.rstd_size[:, 0] * self.r[:, 0]
        return self.to_tokens(self.gate * y_RU), self.gate_up_size, rstd

    def to_tokens(self, rows: Any) -> Any:
        total = np.zeros((self.shape[0], rows.shape[1]))
        np.add.at(total, self.token, rows)
        return total

    def to_experts(self, left: Any, right: Any, before: Any) -> Any:
        total = np.abs(before).astype(float)
        np.add.at(total, self.expert, left[:, :, None] * right[:, None])
        return total

    def backward(self, dy_MU: Any, before: list[Any]) -> Backward:
        """Of the gradients; before: what the weights' gradients are added to."""
        dy = np.abs(dy_MU)[self.token]
        a_size = np.einsum("ru,ruf->rf", dy, self.down[self.expert])
        dgate = np.zeros(self.shape[0] * self.shape[1])
        dgate[self.route] = (a_size * (self.n + self.n_size)).sum(axis=1)
        ddown = self.to_experts(dy, self.gate * self.n_size, before[1])

        dh_size, dnorm = self.gate * a_size, None
        if self.norm is not None:
            dn = dh_size
            dnorm = np.abs(before[2]).astype(float)
            np.add.at(dnorm, self.expert, dn * self.hat_size)
            # dh = r (dn w - hat mean(dn w hat))
            dhat = dn * self.norm
            pull = (dhat * self.hat_size).mean(axis=1, keepdims=True)
            dh_size = self.r * self.rstd_size * (dhat + (self.hat + self.hat_size) * pull)
        dg = dh_size * (
            self.u * self.slope + self.u_size * self.slope + self.u * self.bend * self.g_size
        )
        du = dh_size * (self.act + self.slope * self.g_size)
        dgate_up = np.concatenate([dg, du], axis=1)
        dx = self.to_tokens(np.einsum("rf,rfu->ru", dgate_up, self.gate_up[self.expert]))
        dweight = self.to_experts(dgate_up, self.x, before[0])
        return Backward(dx, dgate.reshape(self.shape), dweight, ddown, dnorm)


class Backward(NamedTuple):
    """Sizes of what the experts' backward returns and adds to."""

    dx_MU: Any
    dgate_MK: Any
    dgate_up_E2FU: Any
    ddown_EUF: Any
    dsub_norm_EF: Any
