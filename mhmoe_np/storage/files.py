"""Writing files so that a crash leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def sync_path(path: Path) -> None:
    """Flush a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it and rename it to `path`.

    On any exception the temporary file is removed and `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        write(temporary)
        sync_path(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_directory_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary directory beside `path`, flush it and rename it to `path`.

    `path` must not exist yet. On any exception the temporary directory is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for entry in temporary.rglob("*"):
            sync_path(entry)
        sync_path(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(path.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that an interruption never leaves a half-deleted one under its name."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted writer left in `directory`."""
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
