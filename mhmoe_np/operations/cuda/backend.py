"""The table of operations on an NVIDIA GPU."""

from __future__ import annotations

from mhmoe_np.operations.cuda.attention import Attention
from mhmoe_np.operations.cuda.embedding import Embedding
from mhmoe_np.operations.cuda.experts import Experts
from mhmoe_np.operations.cuda.feed_forward import FeedForward
from mhmoe_np.operations.cuda.linear import Linear
from mhmoe_np.operations.cuda.loss import Loss
from mhmoe_np.operations.cuda.norm import Norm
from mhmoe_np.operations.cuda.optimiser import Optimiser
from mhmoe_np.operations.cuda.quantise_weight import QuantiseWeight
from mhmoe_np.operations.cuda.router import Router
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.run import Matmul


class CudaOperations(
    Linear,
    Embedding,
    QuantiseWeight,
    Norm,
    Attention,
    FeedForward,
    Router,
    Experts,
    Loss,
    Optimiser,
):
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
