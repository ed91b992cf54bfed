"""The backend for NVIDIA GPUs: kernels in CUDA C, compiled by CuPy, and cuBLAS.

`driver` and `sources` can be imported without CuPy, `backend` cannot.
"""
