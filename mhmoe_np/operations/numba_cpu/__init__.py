"""The default backend: the same operations as `numpy_ref`, parallel and fused where it pays."""

from __future__ import annotations

from numba import set_num_threads

from mhmoe_np.operations.numba_cpu.attention import Attention
from mhmoe_np.operations.numba_cpu.dispatch import DispatchOperations
from mhmoe_np.operations.numba_cpu.experts import Experts
from mhmoe_np.operations.numba_cpu.feed_forward import FeedForward
from mhmoe_np.operations.numba_cpu.gemm import BLAS, limit_blas
from mhmoe_np.operations.numba_cpu.instruction_set import InstructionSet, choose
from mhmoe_np.operations.numba_cpu.joined_step import JoinedSteps
from mhmoe_np.operations.numba_cpu.linear import Linear
from mhmoe_np.operations.numba_cpu.loss import Loss
from mhmoe_np.operations.numba_cpu.norm import Norm
from mhmoe_np.operations.numba_cpu.optimiser import Optimiser
from mhmoe_np.operations.numba_cpu.pack import Pack
from mhmoe_np.operations.numba_cpu.quantise_weight import QuantiseWeight
from mhmoe_np.operations.numba_cpu.router import Router
from mhmoe_np.operations.numba_cpu.sums import Sums
from mhmoe_np.operations.table import BackendName, Blas


class NumbaOperations(
    Sums,
    Linear,
    QuantiseWeight,
    Pack,
    Norm,
    Attention,
    FeedForward,
    Router,
    DispatchOperations,
    Experts,
    Loss,
    Optimiser,
    JoinedSteps,
):
    """The table of operations in Numba.

    keep_buffers: hand results out of a workspace that is reused (see `Workspace`): for a training
    loop that wraps each step in `scope()`.

    prefers_packed: the byte dot product does several times what the floats' products do.

    Making one keeps every BLAS of the process on one thread; the parallelism is Numba's.
    """

    name: BackendName = "numba"
    prefers_packed = True

    def __init__(
        self,
        *,
        threads: int | None = None,
        keep_buffers: bool = False,
        instruction_set: InstructionSet | None = None,
    ) -> None:
        """Make the table.

        threads: None leaves Numba's own choice, one for each core.
        instruction_set: of packed products; None leaves it to `instruction_set.choose`.
        """
        super().__init__(keep_buffers=keep_buffers, instruction_set=instruction_set or choose())
        limit_blas()
        if threads is not None:
            set_num_threads(threads)

    def blas(self) -> Blas:
        """See `Operations.blas`: the one that kernels are bound to."""
        return BLAS.blas()
