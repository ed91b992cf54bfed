"""Compute the vectors in the package anew: `python -m tests.conformance.ship`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mhmoe_np.conformance.folder import SHIPPED, compute_anew


def main() -> None:
    with tempfile.TemporaryDirectory(dir=SHIPPED.parent) as room:
        fresh = Path(room) / "fresh"
        fresh.mkdir()
        compute_anew(fresh)
        shutil.rmtree(SHIPPED)
        fresh.rename(SHIPPED)


if __name__ == "__main__":
    main()
