"""Writing documents as lines of JSON, piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from mhmoe_np.storage.files import temporary_of


class JsonLines:
    """A file of documents in the making; it has its name when it is whole."""

    def __init__(self, path: Path) -> None:
        """Of this name."""
        self._path, self._temporary = path, temporary_of(path)

    def __enter__(self) -> JsonLines:
        """Open it."""
        self._file: IO[str] = self._temporary.open("w", encoding="utf-8", newline="\n")
        self._open = False
        return self

    def write(self, text: str, *, begins: bool) -> None:
        """Write a document, or more of the last one."""
        if begins:
            self._end_line()
            self._file.write('{"text": "')
            self._open = True
        self._file.write(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_line(self) -> None:
        if self._open:
            self._file.write('"}\n')
        self._open = False

    def __exit__(self, kind: object, *_: object) -> None:
        """Give it its name, if nothing was raised."""
        try:
            if kind is None:
                self._end_line()
            self._file.close()
        except OSError as error:
            error.filename = str(self._path)
            raise
        if kind is None:
            self._temporary.replace(self._path)
