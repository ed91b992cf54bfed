"""What a run was started with: versions, processor, threads, BLAS."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mhmoe_np.operations.processor import processor
from mhmoe_np.operations.table import Operations

PACKAGES = ("mhmoe-np", "numpy", "numba", "scipy", "tokenizers", "safetensors")


def environment(*, threads: int, ops: Operations, init: Path | None = None) -> dict[str, Any]:
    """What a run is started with, for whoever reads its figures later.

    ops: the backend.
    init: the checkpoint whose weights it starts from.
    """
    device, blas = ops.device(), ops.blas()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": ops.name,
        "device": None if device is None else device._asdict(),
        "blas": None if blas is None else blas._asdict(),
        "init": None if init is None else os.fsencode(init).decode(errors="backslashreplace"),
        "packages": {name: version(name) for name in PACKAGES},
    }
