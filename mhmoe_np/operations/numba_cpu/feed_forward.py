"""The gated activation and its backward, fused, on blocks of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhmoe_np.operations.numba_cpu.arithmetic import sigmoid
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import task
from mhmoe_np.operations.numba_cpu.regions import (
    ELEMENT_MACS,
    ROWS_ELEMENTWISE,
    block,
    blocks,
    run,
    tasks_of,
)
from mhmoe_np.operations.table import Activation
from mhmoe_np.types import FloatArray


@task
def activate_rows(gate_up_N2F: Any, silu: bool, h_NF: Any) -> None:
    """h = act(gate) * up."""
    real = h_NF.dtype.type
    F = h_NF.shape[1]
    for n in range(h_NF.shape[0]):
        gate_F, up_F, h_F = gate_up_N2F[n, :F], gate_up_N2F[n, F:], h_NF[n]
        if silu:
            for f in range(F):
                h_F[f] = gate_F[f] * sigmoid(gate_F[f]) * up_F[f]
        else:
            for f in range(F):
                positive = max(gate_F[f], real(0))
                h_F[f] = positive * positive * up_F[f]


class Activate(NamedTuple):
    """The gated activation, a block of rows a task."""

    gate_up_N2F: Any
    silu: bool
    h_NF: Any


@tasks_of(Activate)
def _activate(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    activate_rows(a.gate_up_N2F[rows], a.silu, a.h_NF[rows])


@task
def activate_rows_backward(dh_NF: Any, gate_up_N2F: Any, silu: bool, dgate_up_N2F: Any) -> None:
    """dgate = dh up act'(gate), dup = dh act(gate); the slopes are those of `numpy_ref`."""
    real = dh_NF.dtype.type
    F = dh_NF.shape[1]
    for n in range(dh_NF.shape[0]):
        gate_F, up_F, dh_F = gate_up_N2F[n, :F], gate_up_N2F[n, F:], dh_NF[n]
        dgate_F, dup_F = dgate_up_N2F[n, :F], dgate_up_N2F[n, F:]
        if silu:
            for f in range(F):
                s = sigmoid(gate_F[f])
                act = gate_F[f] * s
                dgate_F[f] = dh_F[f] * up_F[f] * (s + act * (real(1) - s))
                dup_F[f] = dh_F[f] * act
        else:
            for f in range(F):
                positive = max(gate_F[f], real(0))
                dgate_F[f] = dh_F[f] * up_F[f] * real(2) * positive
                dup_F[f] = dh_F[f] * positive * positive


class ActivateBackward(NamedTuple):
    """The backward of `Activate`."""

    dh_NF: Any
    gate_up_N2F: Any
    silu: bool
    dgate_up_N2F: Any


@tasks_of(ActivateBackward)
def _activate_backward(i: int, a: Any) -> None:
    rows = block(i, ROWS_ELEMENTWISE)
    activate_rows_backward(a.dh_NF[rows], a.gate_up_N2F[rows], a.silu, a.dgate_up_N2F[rows])


class FeedForward(Buffers):
    """See `Operations`: the gated activation."""

    def gated_activation(self, gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
        """See `Operations.gated_activation`."""
        N, doubled = gate_up_N2F.shape
        h_NF: FloatArray = self.empty((N, doubled // 2), gate_up_N2F.dtype)
        region = Activate(gate_up_N2F, activation == "silu", h_NF)
        run(region, blocks(N, ROWS_ELEMENTWISE), macs=gate_up_N2F.size * ELEMENT_MACS)
        return h_NF

    def gated_activation_backward(
        self, dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
    ) -> FloatArray:
        """See `Operations.gated_activation_backward`."""
        dgate_up_N2F: FloatArray = self.empty(gate_up_N2F.shape, gate_up_N2F.dtype)
        region = ActivateBackward(dh_NF, gate_up_N2F, activation == "silu", dgate_up_N2F)
        run(region, blocks(len(dh_NF), ROWS_ELEMENTWISE), macs=gate_up_N2F.size * ELEMENT_MACS)
        return dgate_up_N2F
