"""A model that is read while its backend is loaded."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import mhmoe_np.checkpoints.checkpoint as checkpoint
from mhmoe_cli import loading
from mhmoe_np.errors import UserError
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress


def test_the_files_are_read_while_the_backend_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to have begun."""
    both = threading.Barrier(2, timeout=60)
    ops = load_operations("numpy")

    class Stored:
        def ready(self, *, ops: Operations) -> Operations:
            return ops

    def read(*_: Any) -> Stored:
        both.wait()
        return Stored()

    def load(*_: Any, **__: Any) -> Operations:
        both.wait()
        return ops

    monkeypatch.setattr(checkpoint, "read_model", read)
    monkeypatch.setattr(loading, "load", load)
    assert loading.load_with_model("numpy", Path("model"), np.float32) == (ops, ops)


def test_a_backend_that_is_not_there_ends_the_reading_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who has no GPU would learn it when a large model has been read."""
    begun = threading.Event()

    def read(_path: Path, _dtype: Any, on_progress: OnProgress) -> NoReturn:
        while True:
            on_progress("reading", 1, 2)
            begun.set()
            time.sleep(0.001)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        assert begun.wait(60)
        raise UserError("no such GPU")

    monkeypatch.setattr(checkpoint, "read_model", read)
    monkeypatch.setattr(loading, "load", refuse)
    with pytest.raises(UserError, match="no such GPU"):
        loading.load_with_model("cuda", Path("model"), np.float32)
