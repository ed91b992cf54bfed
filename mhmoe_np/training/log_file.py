"""A log of JSON lines: appended to, cut back to what a checkpoint knew of it, and read again."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from mhmoe_np.checkpoints.training_state import LogMark
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.storage.reading import check_regular


class LogFile:
    """An open log. A line is in it whole or not at all, as long as the process lives."""

    def __init__(self, path: Path, mark: LogMark) -> None:
        """Go on from `mark`: what stands after it is about to come again, and goes.

        Attributes:
            notice: one line if what stands before it is not what was written, else None; it is kept.
            cut: how many lines went.

        Raises UserError: it is no regular file.
        """
        self._path = path
        if path.exists():
            check_regular(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._end = weakref.finalize(self, os.close, self._descriptor)
        whole = path.read_bytes()
        content, self.cut = whole[: mark.bytes], whole[mark.bytes :].count(b"\n")
        self._sum, self._length = xxhash.xxh3_128(content), len(content)
        self.notice = None
        if self.mark != mark:
            self.notice = f"{path}: damaged: not as it was written; what is left of it is kept"
        os.ftruncate(self._descriptor, self._length)
        if content and not content.endswith(b"\n"):
            self._append(b"\n")  # the next line is not part of a torn one

    @property
    def mark(self) -> LogMark:
        """How far the log has come."""
        return LogMark(bytes=self._length, xxh3_128=self._sum.hexdigest())

    def write(self, value: dict[str, Any]) -> None:
        """Append one line.

        Raises OSError: the disk is full or refuses; the log is as it was.
        """
        self._append((json.dumps(value, allow_nan=False) + "\n").encode())

    def _append(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._length)
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._length += len(line)
        self._sum.update(line)

    def flush(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Nothing more comes."""
        self._end()


class LogLines:
    """The lines of a log, which may be growing, that are objects with a step; others are counted."""

    def __init__(self, path: Path) -> None:
        """Of a log that need not be there."""
        self._path, self._bad = path, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines in order.

        Raises UserError: it is no regular file, or its lines are too much for the memory that is free.
        """
        if not self._path.exists():
            return
        size = check_regular(self._path).st_size
        # Of each number of some ten characters, eight bytes are kept.
        check_memory(size, f"{self._path}: its lines need about", remedy="free some")
        with self._path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                    if not isinstance(value, dict) or not isinstance(value["step"], int):
                        raise ValueError(value)
                except (ValueError, KeyError, RecursionError):
                    self._bad += line.endswith(b"\n")  # else it is just being written
                else:
                    yield value

    @property
    def notice(self) -> str | None:
        """What was left out, if anything was."""
        return f"{self._path}: {self._bad} damaged lines are left out" if self._bad else None


def mark_of_older(path: Path, step: int) -> LogMark:
    """The mark of a log at `step` where the checkpoint kept none: by what its lines say."""
    content = path.read_bytes() if path.exists() else b""
    kept = b""
    for line in content.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # damaged, and not ours to throw away
        kept += line
    return LogMark(bytes=len(kept), xxh3_128=xxhash.xxh3_128_hexdigest(kept))
