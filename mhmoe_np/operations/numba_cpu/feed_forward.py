"""The gated activation and its backward, fused, on blocks of rows."""

from __future__ import annotations

from typing import Any

from numba import prange

from mhmoe_np.operations.numba_cpu.arithmetic import sigmoid
from mhmoe_np.operations.numba_cpu.buffers import Buffers
from mhmoe_np.operations.numba_cpu.compiling import ROWS_ELEMENTWISE, parallel, task
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


@parallel
def _activate(gate_up_N2F: Any, silu: bool, h_NF: Any, rows: int) -> None:
    for block in prange((h_NF.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        activate_rows(gate_up_N2F[n:z], silu, h_NF[n:z])


@parallel
def _activate_backward(dh_NF: Any, gate_up_N2F: Any, silu: bool, dgate_up_N2F: Any, rows: int) -> None:
    for block in prange((dh_NF.shape[0] + rows - 1) // rows):
        n, z = block * rows, (block + 1) * rows
        activate_rows_backward(dh_NF[n:z], gate_up_N2F[n:z], silu, dgate_up_N2F[n:z])


class FeedForward(Buffers):
    """See `Operations`: the gated activation."""

    def gated_activation(self, gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
        """See `Operations.gated_activation`."""
        N, doubled = gate_up_N2F.shape
        h_NF: FloatArray = self.empty((N, doubled // 2), gate_up_N2F.dtype)
        if N <= ROWS_ELEMENTWISE:
            activate_rows(gate_up_N2F, activation == "silu", h_NF)
        else:
            _activate(gate_up_N2F, activation == "silu", h_NF, ROWS_ELEMENTWISE)
        return h_NF

    def gated_activation_backward(
        self, dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
    ) -> FloatArray:
        """See `Operations.gated_activation_backward`."""
        dgate_up_N2F: FloatArray = self.empty(gate_up_N2F.shape, gate_up_N2F.dtype)
        _activate_backward(dh_NF, gate_up_N2F, activation == "silu", dgate_up_N2F, ROWS_ELEMENTWISE)
        return dgate_up_N2F
