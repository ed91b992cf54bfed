"""Operations of the emulated backend once, at small sizes, in a process under one of g++'s sanitizers.

    python -m tests.cuda.under_sanitizer NAME ...    of the functions in tests/operations/runs.py

Needs the environment that `test_sanitizers.py` gives.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mhmoe_np.operations import load

SMALL = {"N": 20, "D": 37, "V": 210, "M": 33}  # V: the quantisers are given a matrix of 200 rows


def without_numba() -> None:
    """A sanitizer need not watch Numba compile."""
    original = load.load_operations

    def load_operations(name: Any, **options: Any) -> Any:
        return None if name == "numba" else original(name, **options)

    load.load_operations = load_operations


def main(names: list[str]) -> None:
    """Run them in float32: float64 is the same source."""
    without_numba()
    from tests.operations import cases, runs

    for name, size in SMALL.items():
        setattr(runs, name, size)
    for run in runs.RUNS:
        if run.__name__ in names:
            done = run(cases.CUDA, cases.Inputs(1, np.float32))
            print(run.__name__, *done)


if __name__ == "__main__":
    main(sys.argv[1:])
