"""Operations for computing a layer from another implementation's numbers instead of our own.

Between the model and a backend: the router is given the other's logits and choices, and an activation
at the quantiser's tie [D9] may be rounded to either side. The experts compute by the other operations
of the table, one after another, so that every BitLinear comes by.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.comparison.difference import reach_of_tie
from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.table import (
    Activation,
    BitWeight,
    Dispatch,
    ExpertCache,
    LayerWeights,
    Operations,
    PackedWeight,
    Routing,
    Weight,
)
from mhmoe_np.types import FloatArray, IntArray


class Others(NamedTuple):
    """What another implementation's router did in one layer; None: it does not say."""

    logits_ME: FloatArray | None
    expert_MK: IntArray | None


class Tie(NamedTuple):
    """An activation that the other implementation's quantiser rounded to the other side."""

    weight: str  # of the BitLinear, by its name within the layer
    token: int
    row: int  # of its input
    column: int
    product: float  # x * 127/gamma, half-way between two integers to rounding


class _Expert(NamedTuple):
    """What one expert's backward needs, of its own rows alone."""

    x_RU: FloatArray
    gate_up_R2F: FloatArray
    h_RF: FloatArray
    n_RF: FloatArray
    rstd_N: FloatArray | None
    y_RU: FloatArray


class Given:
    """The operations of a backend whose arrays are the host's; forwards and backwards."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self._others = Others(None, None)
        self._names: dict[int, str] = {}
        self._code_N: IntArray = np.zeros(0, np.int64)
        self.met_N: IntArray = self._code_N
        self.turned: list[Tie] = []
        self.chosen_MK: IntArray | None = None
        self._acting: dict[int, tuple[FloatArray, FloatArray]] = {}  # input of a BitLinear, as it acts
        self._experts: dict[int, list[_Expert]] = {}

    def __getattr__(self, name: str) -> Any:
        """Every operation that is not done otherwise here."""
        return getattr(self._ops, name)

    def enter(self, w: LayerWeights, others: Others, code_N: IntArray) -> None:
        """A layer begins.

        code_N: bit b of a token's number says whether the b-th activation of it that is met at a tie is
        rounded to the other side. Afterwards `met_N` says how many were met and `turned` which were
        turned; `chosen_MK` is what our router chooses by the other's logits.

        Shapes   code_N
        """
        self._others, self._code_N = others, code_N
        self.met_N, self.turned, self.chosen_MK = np.zeros_like(code_N), [], None
        self._names = {id(weight): name for name, weight in w.items()}

    # ---- the router --------------------------------------------------------------------------

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """See `Operations.route`: of the other's logits, with the other's choice."""
        logits, expert_MK = self._others
        routing = self._ops.route(
            logits_ME if logits is None else logits, top_k=top_k, normalise=normalise
        )
        self.chosen_MK = routing.expert_MK
        if expert_MK is None:
            return routing
        gate_MK = np.take_along_axis(routing.p_ME, expert_MK, axis=1)
        if normalise:
            gate_MK /= gate_MK.sum(axis=1, keepdims=True)
        return routing._replace(expert_MK=expert_MK, gate_MK=gate_MK)

    # ---- quantised linear maps -----------------------------------------------------------------

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """See `Operations.linear`."""
        if isinstance(w_OI, BitWeight):
            rows = len(x_NI) // len(self._code_N)
            token_N = np.arange(len(x_NI)) // max(1, rows)
            acting_NI = self.decided(x_NI, token_N, self._names.get(id(w_OI), ""))
            self._acting[id(x_NI)] = x_NI, acting_NI
            x_NI = acting_NI
        return self._ops.linear(x_NI, w_OI, b_O)

    def linear_backward(
        self,
        dy_NO: FloatArray,
        x_NI: FloatArray,
        w_OI: Weight,
        dw_OI: FloatArray,
        db_O: FloatArray | None,
        *,
        onto_NI: FloatArray | None = None,
    ) -> FloatArray:
        """See `Operations.linear_backward`."""
        if isinstance(w_OI, BitWeight):
            _, x_NI = self._acting.get(id(x_NI), (x_NI, x_NI))
        return self._ops.linear_backward(dy_NO, x_NI, w_OI, dw_OI, db_O, onto_NI=onto_NI)

    def decided(self, x_NI: FloatArray, token_N: IntArray, weight: str) -> FloatArray:
        """x, or where a tie is turned an x that quantises to the other side.

        Shapes   x_NI, token_N -> [N, I]
        """
        q_NI, scale_N = self._ops.quantise_rows(x_NI)
        product_NI = x_NI / scale_N[:, None]
        below_NI = np.floor(product_NI)
        reach = reach_of_tie(x_NI.dtype)
        acting_NI = x_NI
        for row, column in np.argwhere(np.abs(product_NI - below_NI - 0.5) <= reach).tolist():
            token = token_N[row]
            turn = self._code_N[token] >> self.met_N[token] & 1
            self.met_N[token] += 1
            if not turn:
                continue
            if acting_NI is x_NI:
                acting_NI = x_NI.copy()
            # The other of the two integers: the row's largest magnitude, and with it the scale, stays.
            other = 2 * below_NI[row, column] + 1 - q_NI[row, column]
            acting_NI[row, column] = other * scale_N[row]
            self.turned.append(Tie(weight, int(token), row, column, float(product_NI[row, column])))
        return acting_NI

    # ---- experts, step by step -----------------------------------------------------------------

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
        eps: float,
    ) -> tuple[FloatArray, ExpertCache]:
        """See `Operations.expert_ffn`."""
        M, K = gate_MK.shape
        if isinstance(gate_up_E2FU, BitWeight):
            # One row of integers serves all experts that a sub-token goes to.
            token_M = np.arange(M) // (M // len(self._code_N))
            x_MU = self.decided(x_MU, token_M, self._names.get(id(gate_up_E2FU), ""))
        y_MU, kept = np.zeros_like(x_MU), []
        R, F2 = len(dispatch.route_R), gate_up_E2FU.shape[1]
        gate_up_R2F = np.empty((R, F2), x_MU.dtype)
        for e, rows in enumerate(_segments(dispatch)):
            route_R = dispatch.route_R[rows]
            x_RU = x_MU[route_R // K]
            gate_up_R2F[rows] = gate_up = self._ops.linear(x_RU, of_expert(gate_up_E2FU, e), None)
            h_RF = n_RF = self._ops.gated_activation(gate_up, activation=activation)
            rstd_N = None
            if sub_norm_EF is not None:
                n_RF, rstd_N = self._ops.rms_norm(h_RF, sub_norm_EF[e], eps=eps)
            if isinstance(down_EUF, BitWeight):
                token_R = route_R // K // (M // len(self._code_N))
                n_RF = self.decided(n_RF, token_R, self._names.get(id(down_EUF), ""))
            y_RU = self._ops.linear(n_RF, of_expert(down_EUF, e), None)
            y_MU[route_R // K] += gate_MK.reshape(-1, 1)[route_R] * y_RU
            kept.append(_Expert(x_RU, gate_up, h_RF, n_RF, rstd_N, y_RU))
        self._experts[id(gate_up_R2F)] = kept
        return y_MU, ExpertCache(gate_up_R2F, None)

    def expert_ffn_backward(
        self,
        dy_MU: FloatArray,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        gate_up_E2FU: Weight,
        down_EUF: Weight,
        sub_norm_EF: FloatArray | None,
        cache: ExpertCache,
        dgate_up_E2FU: FloatArray,
        ddown_EUF: FloatArray,
        dsub_norm_EF: FloatArray | None,
        *,
        activation: Activation,
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.expert_ffn_backward`; of what this `expert_ffn` kept."""
        K = gate_MK.shape[1]
        dx_MU, dgate_MK = np.zeros_like(x_MU), np.zeros_like(gate_MK)
        kept = self._experts[id(cache.gate_up_R2F)]
        for e, (rows, expert) in enumerate(zip(_segments(dispatch), kept, strict=True)):
            route_R = dispatch.route_R[rows]
            dy_RU = dy_MU[route_R // K]
            dgate_MK.reshape(-1)[route_R] = (dy_RU * expert.y_RU).sum(axis=1)
            dh_RF = self._ops.linear_backward(
                gate_MK.reshape(-1, 1)[route_R] * dy_RU,
                expert.n_RF,
                of_expert(down_EUF, e),
                ddown_EUF[e],
                None,
            )
            if sub_norm_EF is not None and expert.rstd_N is not None and dsub_norm_EF is not None:
                dh_RF = self._ops.rms_norm_backward(
                    dh_RF, expert.h_RF, sub_norm_EF[e], expert.rstd_N, dsub_norm_EF[e]
                )
            dgate_up_R2F = self._ops.gated_activation_backward(
                dh_RF, expert.gate_up_R2F, activation=activation
            )
            dx_MU[route_R // K] += self._ops.linear_backward(
                dgate_up_R2F, expert.x_RU, of_expert(gate_up_E2FU, e), dgate_up_E2FU[e], None
            )
        return dx_MU, dgate_MK


def _segments(dispatch: Dispatch) -> list[slice]:
    """The rows of each expert."""
    starts = dispatch.start_Z.tolist()
    return [slice(*ends) for ends in pairwise(starts)]


def of_expert(w: Weight, e: int) -> Weight:
    """One expert's weight of those that are stacked."""
    if isinstance(w, BitWeight):
        return BitWeight(w.w[e], w.beta[e])
    assert not isinstance(w, PackedWeight | Int8Weight | BFloat16Weight)
    return w[e]
