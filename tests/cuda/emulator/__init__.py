"""CUDA without a GPU: unchanged `.cu` files run on the CPU, behind a stand-in for CuPy.

What passes here is "compiled and emulated", never "run on a GPU": `cuda_on_cpu.hpp` says what is not
modelled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache

from tests.cuda.emulator import cupy_on_cpu


@cache
def has_gpu() -> bool:
    """Whether there is a GPU and the real CuPy to run on it."""
    if sys.modules.get("cupy") is cupy_on_cpu or importlib.util.find_spec("cupy") is None:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")  # without a driver CuPy need not be asked
        import cupy

        return bool(cupy.cuda.is_available())
    except Exception:  # A CuPy that cannot start has no GPU.
        return False


def install() -> None:
    """Let `import cupy` give the stand-in, and cuBLAS be emulated too. Once for a process.

    Raises RuntimeError: the backend was imported already with another CuPy.
    """
    if sys.modules.get("cupy") is cupy_on_cpu:
        return
    if "mhmoe_np.operations.cuda.device" in sys.modules:
        raise RuntimeError("the cuda backend was imported before its stand-in")
    sys.modules["cupy"] = cupy_on_cpu
    from tests.cuda.emulator import cublas_on_cpu

    cublas_on_cpu.install()
