"""Operations under the roof: what they reach of what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.floors import BANDWIDTH, RATES
from benchmarks.gpu_job import Row


def draw(operations: list[Row], path: Path, device: str) -> None:
    """operations: rows of `gpu_ours.single_operations`."""
    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = np.geomspace(0.05, 1000, 200)
    for name in ("float32", "tf32"):
        axes.loglog(
            intensity, np.minimum(intensity * BANDWIDTH, RATES[name]) / 1e12, label=f"H100, {name}"
        )
    for size in dict.fromkeys(row["size"] for row in operations):
        rows = [row for row in operations if row["size"] == size and row["tflop_per_s"] > 0]
        points = [[max(row["intensity"], 0.05) for row in rows], [row["tflop_per_s"] for row in rows]]
        axes.loglog(*points, "o", label=f"size {size}")
    largest = max((row["us"] * row["calls"] for row in operations), default=0)
    for row in operations:
        if row["us"] * row["calls"] > largest / 20 and row["tflop_per_s"] > 0:
            where = max(row["intensity"], 0.05), row["tflop_per_s"]
            axes.annotate(row["operation"], where, fontsize=7)
    axes.set_xlabel("FLOP for each byte of the floor")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Operations of a training step on {device}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
