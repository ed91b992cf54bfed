"""What a run was started with: versions, processor, threads."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mhmoe_np.operations.table import Operations

PACKAGES = ("mhmoe-np", "numpy", "numba", "scipy", "tokenizers", "safetensors")


def environment(*, threads: int, ops: Operations, init: Path | None = None) -> dict[str, Any]:
    """What a run is started with, for whoever reads its figures later.

    ops: the backend.
    init: the checkpoint whose weights it starts from.
    """
    device = ops.device()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": ops.name,
        "device": None if device is None else device._asdict(),
        "init": None if init is None else os.fsencode(init).decode(errors="backslashreplace"),
        "packages": {name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor, as it names itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
