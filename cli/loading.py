"""Loading a checkpoint's model together with the backend that runs it."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mhmoe_cli.backend import load
from mhmoe_cli.progress import progress
from mhmoe_np.operations.table import BackendName, Operations

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from mhmoe_np.model.language_model import Model


def load_with_model(
    name: BackendName,
    checkpoint: Path,
    dtype: DTypeLike,
    *,
    threads: int | None = None,
    keep_buffers: bool = False,
) -> tuple[Operations, Model]:
    """The backend and the model of a checkpoint directory, whose files are read meanwhile.

    While one core imports Numba, another makes checksums and copies, which need no lock of Python's.

    Raises UserError: as `load` and `load_model`.
    """
    from mhmoe_np.checkpoints.checkpoint import read_model

    gone = threading.Event()
    with progress("bytes") as show, ThreadPoolExecutor(1) as reader:

        def show_or_end(stage: str, done: int, total: int) -> None:
            if gone.is_set():
                raise CancelledError  # nobody waits any more, and a large model takes long
            show(stage, done, total)

        reading = reader.submit(read_model, checkpoint, dtype, show_or_end)
        try:
            ops = load(name, threads=threads, keep_buffers=keep_buffers)
            return ops, reading.result().ready(ops=ops)
        finally:
            gone.set()
