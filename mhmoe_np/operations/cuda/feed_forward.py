"""The gated activation of SwiGLU and of its squared-ReLU sibling; `feed_forward.cu` has the kernels."""

from __future__ import annotations

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.table import Activation
from mhmoe_np.types import FloatArray

BLOCK = 32, 8  # columns and rows
KERNELS = Kernels("feed_forward")


class FeedForward(Memory):
    """See `Operations`: feed-forward."""

    def gated_activation(self, gate_up_N2F: FloatArray, *, activation: Activation) -> FloatArray:
        """See `Operations.gated_activation`."""
        N, F = len(gate_up_N2F), gate_up_N2F.shape[1] // 2
        h_NF: FloatArray = self.empty((N, F), gate_up_N2F.dtype)
        arguments = gate_up_N2F, N, F, h_NF
        KERNELS.launch(f"{activation}_gate", h_NF.dtype, _grid(N, F), BLOCK, *arguments)
        return h_NF

    def gated_activation_backward(
        self, dh_NF: FloatArray, gate_up_N2F: FloatArray, *, activation: Activation
    ) -> FloatArray:
        """See `Operations.gated_activation_backward`."""
        N, F = dh_NF.shape
        dgate_up_N2F: FloatArray = self.empty((N, 2 * F), dh_NF.dtype)
        arguments = dh_NF, gate_up_N2F, N, F, dgate_up_N2F
        KERNELS.launch(f"{activation}_gate_backward", dh_NF.dtype, _grid(N, F), BLOCK, *arguments)
        return dgate_up_N2F


def _grid(N: int, F: int) -> tuple[int, int]:
    return blocks(N, BLOCK[1]), blocks(F, BLOCK[0])
