"""The embedding: rows by id; `embedding.cu` has the kernels."""

from __future__ import annotations

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.dispatch import DispatchOperations
from mhmoe_np.types import FloatArray, IntArray

WARP, ROWS = 32, 8
COLUMNS = 64  # of a warp in the backward
BLOCK = (WARP, ROWS)
KERNELS = Kernels("embedding")


class Embedding(DispatchOperations):
    """See `Operations`: the embedding."""

    def embedding(self, id_N: IntArray, w_VD: FloatArray) -> FloatArray:
        """See `Operations.embedding`."""
        N, D = len(id_N), w_VD.shape[1]
        x_ND: FloatArray = self.empty((N, D), w_VD.dtype)
        KERNELS.launch("embedding", w_VD.dtype, (blocks(N, ROWS),), BLOCK, id_N, w_VD, N, D, x_ND)
        return x_ND

    def embedding_backward(self, dx_ND: FloatArray, id_N: IntArray, dw_VD: FloatArray) -> None:
        """See `Operations.embedding_backward`. Rows are sorted by id as choices are by expert."""
        N, D = dx_ND.shape
        with self.scope():
            route_R, _, start_Z = self.dispatch(id_N.reshape(N, 1), experts=len(dw_VD), capacity=None)
            grid = blocks(N, ROWS), blocks(D, COLUMNS)
            KERNELS.launch(
                "embedding_backward",
                dx_ND.dtype,
                grid,
                BLOCK,
                *(dx_ND, id_N, route_R, start_Z, N, D, dw_VD),
            )
