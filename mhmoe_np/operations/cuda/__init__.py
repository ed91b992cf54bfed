"""The backend for NVIDIA GPUs: kernels in CUDA C, compiled by CuPy, and cuBLAS.

`load` makes one; importing this package needs CuPy.
"""

from __future__ import annotations

from mhmoe_np.operations.cuda.attention import Attention
from mhmoe_np.operations.cuda.sums import Sums


class CudaOperations(Sums, Attention):
    """The table of operations on the GPU."""

    prefers_packed = True
