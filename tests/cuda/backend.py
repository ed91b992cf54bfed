"""The cuda backend as tests have it: on a GPU where there is one, else emulated."""

from __future__ import annotations

from itertools import cycle
from typing import Any, cast

import pytest

from mhmoe_np.operations.table import Operations
from tests.cuda.emulator import cupy_on_cpu, has_gpu, install

ORDERS = (0, 1, 7)  # of the emulated threads: as numbered, reversed, shuffled


def cuda_operations(**options: Any) -> Operations:
    """The backend; emulated, each operation runs with its threads in the next of `ORDERS`."""
    if not has_gpu():
        install()
    from mhmoe_np.operations.cuda.backend import CudaOperations

    ops = cast(Operations, CudaOperations(**{"keep_buffers": False, **options}))
    return ops if has_gpu() else cast(Operations, _InEveryOrder(ops))


class _InEveryOrder:
    """A backend whose operations see another order of threads at each call."""

    def __init__(self, ops: Operations) -> None:
        self._ops, self._orders = ops, cycle(ORDERS)

    def __getattr__(self, name: str) -> Any:
        cupy_on_cpu.emulation.order_seed = next(self._orders)
        return getattr(self._ops, name)


on_the_device = [pytest.mark.gpu] if has_gpu() else []
emulated_only = pytest.mark.skipif(has_gpu(), reason="counted by the emulator")
