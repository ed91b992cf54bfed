"""Whether there is an NVIDIA GPU to run on, asked of the driver and before CuPy is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import Operations

if TYPE_CHECKING:
    from mhmoe_np.settings.run import Matmul

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
OLDEST_CUDA = 12
OLDEST_COMPUTE_CAPABILITY = 75
TENSOR_CORES_COMPUTE_CAPABILITY = 80  # those that multiply TF32, and bytes as `packed.cu` has them
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
ELSEWHERE = "use --backend numba"


def check_driver() -> None:
    """Make sure that a driver, a device and CuPy are there.

    Raises UserError: one is not, or the driver is too old; the line says what to do.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise UserError(
            f"--backend cuda: this machine has no NVIDIA driver ({LIBRARY}); install it, or {ELSEWHERE}"
        ) from None
    error, count, version = driver.cuInit(0), ctypes.c_int(), ctypes.c_int()
    if error not in (0, NO_DEVICE):
        raise UserError(
            f"--backend cuda: the NVIDIA driver does not start (cuInit gives error {error}); does "
            f"nvidia-smi work? Mend it, or {ELSEWHERE}"
        )
    if error or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise UserError(
            "--backend cuda: no NVIDIA GPU is visible; is CUDA_VISIBLE_DEVICES set? Else " + ELSEWHERE
        )
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = version.value // 1000
    if cuda < OLDEST_CUDA:
        raise UserError(
            f"--backend cuda: the NVIDIA driver is too old: it is for CUDA {cuda}, {OLDEST_CUDA} or "
            "later is needed; update it"
        )
    if importlib.util.find_spec("cupy") is None:
        extra = f"cupy-cuda{min(cuda, 13)}x"
        raise UserError(f"--backend cuda: CuPy is not installed; pip install 'mhmoe-np[{extra}]'")


def check_cupy(cupy: Any, matmul: Matmul) -> None:
    """Make sure that CuPy fits the driver, and its device this backend's kernels and `matmul`.

    Raises UserError: it does not.
    """
    runtime = cupy.cuda.runtime
    wanted, has = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
    if wanted > has:
        raise UserError(
            f"--backend cuda: CuPy is for CUDA {wanted}, the NVIDIA driver for CUDA {has}: update the "
            f"driver, or pip install 'mhmoe-np[cupy-cuda{has}x]'"
        )
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < OLDEST_COMPUTE_CAPABILITY:
        raise UserError(
            f"--backend cuda: the GPU's compute capability is {capability / 10}, "
            f"{OLDEST_COMPUTE_CAPABILITY / 10} or more is needed; {ELSEWHERE}"
        )
    if matmul != "float32" and capability < TENSOR_CORES_COMPUTE_CAPABILITY:
        raise UserError(
            f"--set training.matmul={matmul}: the GPU's compute capability is {capability / 10}, "
            f"{TENSOR_CORES_COMPUTE_CAPABILITY / 10} or more is needed; set it to float32"
        )


def load(*, keep_buffers: bool, matmul: Matmul) -> Operations:
    """The backend.

    Raises UserError: see `check_driver` and `check_cupy`.
    """
    check_driver()
    import cupy

    check_cupy(cupy, matmul)
    from mhmoe_np.operations.cuda.backend import CudaOperations

    return CudaOperations(keep_buffers=keep_buffers, matmul=matmul)
