"""What checksums cost when a checkpoint is written.

    python -m benchmarks.checkpoint [--size A|B] [--repeats 12] [--folder DIR]

Writes training checkpoints of the benchmark's MH-MoE by turns, with checksums and with constants in
their place, and prints the median seconds of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.sizes import benchmark_config
from mhmoe_np.checkpoints.training_state import (
    TrainerState,
    TrainingCheckpoint,
    save_training_checkpoint,
)
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.settings.run import parse_run_config
from mhmoe_np.storage import checksums


def a_checkpoint(size: str) -> TrainingCheckpoint:
    """Every number different from 0: a file system may have a short way with zeros."""
    model = benchmark_config(size, "mhmoe")
    training = {"steps": 1, "batch_size": 1, "sequence_length": model.max_position_embeddings}
    tables = {"model": model.model_dump(), "training": training}
    state = TrainerState(step=1, config=parse_run_config(tables, source="benchmark"), logs={})
    groups = [Parameters(model, np.float32) for _ in range(3)]
    for seed, group in enumerate(groups):
        initialise(group, seed)
    return TrainingCheckpoint(groups[0], Moments(*groups[1:]), state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["A", "B"], default="A")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    checkpoint = a_checkpoint(arguments.size)
    tokenizer = train_tokenizer(["a tokenizer"], vocab_size=300)
    sums = {"with": checksums.checksum, "without": lambda path: "0" * 32}
    seconds: dict[str, list[float]] = {name: [] for name in sums}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        directory = Path(folder) / "step-00000001"
        for _ in range(arguments.repeats):
            for name, checksum in sums.items():
                os.sync()  # nothing of the last one is still on its way
                with mock.patch.object(checksums, "checksum", checksum):
                    start = time.perf_counter()
                    save_training_checkpoint(directory, checkpoint, tokenizer)
                    seconds[name].append(time.perf_counter() - start)
                shutil.rmtree(directory)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    megabytes = 3 * checkpoint.parameters.flat_P.nbytes / 1e6
    cost = medians["with"] / medians["without"] - 1
    print(
        f"size {arguments.size}, {megabytes:.0f} MB: {medians['with']:.4f} s with checksums, "
        f"{medians['without']:.4f} s without: {cost:+.1%}"
    )


if __name__ == "__main__":
    main()
