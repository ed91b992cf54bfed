"""Emulated, every operation gives the same bits in each order of threads: no race, no float atomics."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.operations.table import Operations
from tests.cuda.backend import ORDERS, emulated_only
from tests.cuda.emulator.cupy_on_cpu import emulation
from tests.operations.cases import same_bits
from tests.operations.runs import TABLE, run_table

pytestmark = emulated_only


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_the_order_of_threads_changes_no_bit(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhmoe_np.operations.cuda.backend import CudaOperations  # once the stand-in is in place

    ops = on_host(cast(Operations, CudaOperations()))
    done = []
    for order in ORDERS:
        monkeypatch.setattr(emulation, "order_seed", order)
        done.append(run_table(ops, dtype, seed=11))
    assert set(done[0]) >= TABLE - {"add_sum"}
    for other in done[1:]:
        for operation, results in done[0].items():
            same_bits(other[operation], results)
