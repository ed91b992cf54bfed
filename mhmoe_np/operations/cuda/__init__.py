"""The backend for NVIDIA GPUs: kernels in CUDA C, compiled by CuPy, and cuBLAS.

`load` makes one; importing this package needs CuPy.
"""

from __future__ import annotations

from mhmoe_np.operations.cuda.embedding import Embedding
from mhmoe_np.operations.cuda.optimiser import Optimiser
from mhmoe_np.operations.cuda.router import Router
from mhmoe_np.operations.cuda.sums import Sums


class CudaOperations(Router, Embedding, Optimiser, Sums):
    """The table of operations on the GPU."""

    prefers_packed = True
