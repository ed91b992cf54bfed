"""The backend for NVIDIA GPUs: kernels in CUDA C, compiled by CuPy, and cuBLAS.

`load` makes one; importing this package needs CuPy.
"""

from __future__ import annotations

from mhmoe_np.operations.cuda.feed_forward import FeedForward
from mhmoe_np.operations.cuda.linear import Linear
from mhmoe_np.operations.cuda.loss import Loss
from mhmoe_np.operations.cuda.norm import Norm


class CudaOperations(Linear, Norm, FeedForward, Loss):
    """The table of operations on the GPU."""

    prefers_packed = True
