"""Writing files so that a crash leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhmoe_np.errors import Taken, UserError
from mhmoe_np.storage.lock import Lock, lock_folder

TEMPORARY_PREFIX = ".tmp-"


def sync_path(path: Path) -> None:
    """Flush a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_of(path: Path) -> Path:
    """Where `path` is written before it gets its name."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it and rename it to `path`.

    On any exception the temporary file is removed and `path` is as it was.
    """
    temporary = temporary_of(path)
    try:
        write(temporary)
        sync_path(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; for a directory in the making, which is flushed and named as a whole.

    Raises OSError: the disk is full or refuses.
    """
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        error.filename = str(path)  # a write that fails does not say where
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON with a final newline.

    Raises ValueError: a number is not finite, which JSON has no word for; OSError: see `write_text`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_directory_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary directory beside `path`, flush it and rename it to `path`.

    `path` must not exist yet. On any exception the temporary directory is removed.

    Raises Taken: see `new_locked_directory`.
    """
    new_locked_directory(path, fill).release()


def new_locked_directory(
    path: Path,
    fill: Callable[[Path], None],
    *,
    is_unfinished: Callable[[Path], bool] = lambda _: False,
) -> Lock:
    """`write_directory_atomically`, whose directory is locked from its first moment on.

    So nobody else fills the same one meanwhile, and what a crash left behind is known by being free.

    is_unfinished: whether a temporary directory holds work that `fill` can go on with. Such a one stays
    when anything but bad input ends `fill`, and the next call gives it to `fill` as it is.

    Raises Taken: `path` exists, or another process is making it.
    """
    made = _make_parents(path.parent)
    temporary = temporary_of(path)
    try:
        try:
            lock = _locked_directory(temporary, is_unfinished)
        except Taken:
            raise Taken(f"{path}: another process is making it; choose another name") from None
        except BaseException:  # interrupted between making and locking it
            with contextlib.suppress(OSError):
                temporary.rmdir()
            raise
        try:
            fill(temporary)
            for entry in temporary.rglob("*"):
                sync_path(entry)
            sync_path(temporary)
            if path.exists():
                raise Taken(f"{path}: exists already; choose another name")
            temporary.rename(path)
        except BaseException as error:
            if isinstance(error, UserError) or not is_unfinished(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
            lock.release()
            raise
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else put something there
                folder.rmdir()
        raise
    sync_path(path.parent)
    return lock


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; which were made, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _locked_directory(path: Path, is_unfinished: Callable[[Path], bool]) -> Lock:
    path.mkdir(exist_ok=True)
    lock = lock_folder(path)
    if not is_unfinished(path):
        for entry in path.iterdir():  # of a writer that was killed
            _remove(entry)
    return lock


def remove_directory(path: Path) -> None:
    """Delete a directory so that an interruption never leaves a half-deleted one under its name.

    Of a link, the link goes; a plain file goes too.
    """
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    _remove(doomed)
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted writer left in `directory`."""
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        _remove(entry)
