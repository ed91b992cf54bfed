"""The whole table once on the emulated backend: for a process of its own, under one of g++'s sanitizers.

    python -m tests.cuda.under_sanitizer [SIZES]

Needs the environment that `test_sanitizers.py` gives. SIZES: "small" for sizes of a few rows.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mhmoe_np.operations import load

SMALL = {"N": 20, "D": 37, "V": 210, "M": 33}


def without_numba() -> None:
    """Tests load the backends of the host too; a sanitizer need not watch Numba compile."""
    original = load.load_operations

    def load_operations(name: Any, **options: Any) -> Any:
        return None if name == "numba" else original(name, **options)

    load.load_operations = load_operations


def main(sizes: str) -> None:
    """Run it in float32: float64 is the same source."""
    without_numba()
    from tests.operations import cases, runs

    if sizes == "small":
        for name, size in SMALL.items():
            setattr(runs, name, size)
    done = runs.run_table(cases.CUDA, np.float32, seed=1)
    assert set(done) == runs.TABLE


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["full"]))
