"""The smooth model whose exact gradient is BitNet's straight-through one.

Straight-through counts a quantiser as the identity and its scales as constants: it is the gradient of a
forward in which every quantiser adds a constant, x + (x_hat - x at the point) and W + (w_hat - W at the
point). There the surrogate equals the quantised model, and around it it can be differentiated; the
quantised model itself is flat between jumps.

Source   [spec 5 straight-through], [B1 section 2.2]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import Weights
from mhmoe_np.operations.table import (
    Activation,
    BitWeight,
    Dispatch,
    ExpertCache,
    Operations,
    Weight,
)
from mhmoe_np.types import FloatArray, IntArray


class ActingWeight(NamedTuple):
    """A float weight in the place of a quantised one: what it acts as, moved with the parameter."""

    w: FloatArray  # [O, I], or [E, O, I]

    @classmethod
    def of(cls, quantised: BitWeight, at_OI: FloatArray, moved_OI: FloatArray) -> ActingWeight:
        """beta w + (moved - at), `quantised` being what `at_OI` quantises to."""
        return cls(quantised.beta[..., None] * quantised.w - at_OI + moved_OI)


class ChoiceSwitchedError(Exception):
    """The router sends rows elsewhere than in the first pass: the constants are of other rows."""


class Surrogate:
    """Operations on NumPy's arrays in which a BitLinear's activations are only moved by constants.

    The first pass after construction sets the constants, one array for each product in the order of
    calls; `rewind` starts another pass over the same products. What has no quantiser is done by `ops`.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops = on_host(ops)
        self._offsets: list[FloatArray] = []
        self._routes: list[IntArray] = []  # rows, and where each expert's begin
        self.rewind()

    def __getattr__(self, name: str) -> Any:
        """The operation of this name: that of `ops`."""
        return getattr(self._ops, name)

    def rewind(self) -> None:
        """Start another pass."""
        self._next = self._next_route = 0

    def _acting(self, x_NI: FloatArray) -> FloatArray:
        """x moved by the constant of the next product."""
        if self._next == len(self._offsets):
            q_NI, scale_N = self._ops.quantise_rows(x_NI)
            self._offsets.append(q_NI * scale_N[:, None] - x_NI)
        self._next += 1
        return x_NI + self._offsets[self._next - 1]

    def linear(
        self, x_NI: FloatArray, w_OI: Weight | ActingWeight, b_O: FloatArray | None
    ) -> FloatArray:
        """See `Operations.linear`."""
        if isinstance(w_OI, ActingWeight):
            return self._ops.linear(self._acting(x_NI), w_OI.w, b_O)
        return self._ops.linear(x_NI, w_OI, b_O)

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight | ActingWeight,
        down_EUF: Weight | ActingWeight,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache | None]:
        """See `Operations.expert_ffn`; the cache is None where there is nothing to go back through.

        Raises ChoiceSwitchedError: not the rows of the first pass.
        """
        if not isinstance(gate_up_E2FU, ActingWeight) or not isinstance(down_EUF, ActingWeight):
            assert not isinstance(gate_up_E2FU, ActingWeight)
            assert not isinstance(down_EUF, ActingWeight)
            return self._ops.expert_ffn(
                x_MU,
                gate_MK,
                dispatch,
                gate_up_E2FU,
                down_EUF,
                sub_norm_EF,
                activation=activation,
                eps=eps,
            )
        route_R, _, start_Z = dispatch
        route = np.concatenate([route_R, start_Z])
        if self._next_route == len(self._routes):
            self._routes.append(route)
        if not np.array_equal(route, self._routes[self._next_route]):
            raise ChoiceSwitchedError
        self._next_route += 1
        y_MU = np.zeros_like(x_MU)
        for e in np.flatnonzero(np.diff(start_Z)):
            choice = route_R[start_Z[e] : start_Z[e + 1]]
            sub_token = choice // gate_MK.shape[1]
            gate_up = self.linear(x_MU[sub_token], ActingWeight(gate_up_E2FU.w[e]), None)
            h = self._ops.gated_activation(gate_up, activation=activation)
            if sub_norm_EF is not None:
                h, _ = self._ops.rms_norm(h, sub_norm_EF[e], eps=eps)
            y = self.linear(h, ActingWeight(down_EUF.w[e]), None)
            y_MU[sub_token] += gate_MK.ravel()[choice, None] * y
        return y_MU, None


def acting_weights(quantised: Weights, at: Parameters, moved: Parameters) -> Weights:
    """The weights of the surrogate: `quantised` are those of `at`; the parameters are now `moved`."""
    arrays: dict[str, Any] = dict(moved.arrays)
    for name, weight in quantised.arrays.items():
        if isinstance(weight, BitWeight):
            arrays[name] = ActingWeight.of(weight, at.arrays[name], moved.arrays[name])
    return Weights(moved.config, arrays)
