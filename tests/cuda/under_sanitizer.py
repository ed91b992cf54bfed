"""The whole table once on the emulated backend, in a process of its own under one of g++'s sanitizers.

    python -m tests.cuda.under_sanitizer

Needs the environment that `test_sanitizers.py` gives. Of a few rows: it takes many times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.operations import load

SMALL = {"N": 20, "D": 37, "V": 210, "M": 33}
MOST_POSITIONS, MOST_HEADS = 70, 6  # of attention


def without_numba() -> None:
    """Tests load the backends of the host too; a sanitizer need not watch Numba compile."""
    original = load.load_operations

    def load_operations(name: Any, **options: Any) -> Any:
        return None if name == "numba" else original(name, **options)

    load.load_operations = load_operations


def with_small_sizes() -> None:
    """What `run_table` computes, smaller."""
    from tests.operations import cases, runs

    for name, size in SMALL.items():
        setattr(runs, name, size)
    joint = cases.Inputs.joint

    def short(self: Any, B: int, T: int, A: int, G: int, C: int) -> Any:
        A, G = min(A, MOST_HEADS), min(G, MOST_HEADS // 2)
        return joint(self, B, min(T, MOST_POSITIONS), A, G, C)

    cases.Inputs.joint = short  # type: ignore[method-assign]


def main() -> None:
    """Run it in float32: float64 is the same source."""
    without_numba()
    with_small_sizes()
    from tests.operations import cases, runs

    assert set(runs.run_table(cases.CUDA, np.float32, seed=1)) == runs.TABLE


if __name__ == "__main__":
    main()
