"""This package as if it were a port: its own results of every vector.

python -m tests.conformance.ours numpy float64 FOLDER    prints the processor that OpenBLAS sees
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from mhmoe_np.conformance.catalogue import all_vectors
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from tests.conformance.results import save


def write(ops: Operations, dtype: str, folder: Path) -> None:
    for vector in all_vectors():
        save(folder, vector.name, vector.outcome(ops, np.dtype(dtype)).tensors)


def blas_architectures() -> set[str]:
    return {library["architecture"] for library in threadpool_info() if "architecture" in library}


if __name__ == "__main__":
    backend, dtype, folder = sys.argv[1:]
    write(load_operations(backend), dtype, Path(folder))
    print(*sorted(blas_architectures()))
