"""RMSNorm, of x or of a sum of two; `norm.cu` has the kernels."""

from __future__ import annotations

from mhmoe_np.operations.cuda.device import Kernels, blocks, threads_of_row
from mhmoe_np.operations.cuda.sums import Sums
from mhmoe_np.types import FloatArray

THREADS, ROWS = 256, 16  # of the backward's blocks
KERNELS = Kernels("norm")


class Norm(Sums):
    """See `Operations`: normalisation."""

    def rms_norm(
        self, x_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.rms_norm`."""
        (N, D), dtype = x_ND.shape, x_ND.dtype
        y_ND, rstd_N = self.empty((N, D), dtype), self.empty((N,), dtype)
        KERNELS.launch("rms_norm", dtype, (N,), (threads_of_row(D),), x_ND, w_D, D, eps, y_ND, rstd_N)
        return y_ND, rstd_N

    def add_in_place_and_norm(
        self, x_ND: FloatArray, branch_ND: FloatArray, w_D: FloatArray, *, eps: float
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.add_in_place_and_norm`."""
        (N, D), dtype = x_ND.shape, x_ND.dtype
        y_ND, rstd_N = self.empty((N, D), dtype), self.empty((N,), dtype)
        arguments = x_ND, branch_ND, w_D, D, eps, y_ND, rstd_N
        KERNELS.launch("add_in_place_and_norm", dtype, (N,), (threads_of_row(D),), *arguments)
        return y_ND, rstd_N

    def rms_norm_backward(
        self,
        dy_ND: FloatArray,
        x_ND: FloatArray,
        w_D: FloatArray,
        rstd_N: FloatArray,
        dw_D: FloatArray,
        *,
        onto_ND: FloatArray | None = None,
    ) -> FloatArray:
        """See `Operations.rms_norm_backward`."""
        (N, D), dtype = x_ND.shape, x_ND.dtype
        dx_ND = self.empty((N, D), dtype) if onto_ND is None else onto_ND
        grid = (blocks(N, ROWS),)
        with self.scope():
            dw_BD = self.empty((*grid, D), dtype)
            arguments = dy_ND, x_ND, w_D, rstd_N, N, D, onto_ND is not None, dx_ND, dw_BD
            KERNELS.launch("rms_norm_backward", dtype, grid, (THREADS,), *arguments)
            self._add_column_sums(dw_BD, dw_D)
        return dx_ND
