"""The backend for NVIDIA GPUs: kernels in CUDA C, compiled by CuPy, and cuBLAS.

`load` makes one; importing this package needs CuPy.
"""

from __future__ import annotations

from mhmoe_np.operations.cuda.packed import PackedProducts
from mhmoe_np.operations.cuda.quantise_weight import QuantiseWeight
from mhmoe_np.operations.cuda.sums import Sums


class CudaOperations(Sums, QuantiseWeight, PackedProducts):
    """The table of operations on the GPU."""

    prefers_packed = True
    compute_capability = 80
