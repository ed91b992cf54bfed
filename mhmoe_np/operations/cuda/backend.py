"""The table of operations on an NVIDIA GPU."""

from __future__ import annotations

from mhmoe_np.operations.cuda.sums import Sums
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.run import Matmul


class CudaOperations(Sums):
    """See `Operations`.

    keep_buffers: hand results out of a workspace that is reused, and record what `repeated` is given:
    for callers that wrap their work in `scope()`.
    matmul: how float32 products are computed: as such, in TF32, or as three products in TF32 that
    together have about float32's accuracy.

    prefers_packed: integer products do several times what the floats' do.
    """

    name: BackendName = "cuda"
    prefers_packed = True

    def __init__(self, *, keep_buffers: bool = False, matmul: Matmul = "float32") -> None:
        super().__init__(keep_buffers=keep_buffers, matmul=matmul)
