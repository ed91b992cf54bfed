"""Writing a store's shards, so that what is whole stays when it is interrupted."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_np.data.chunks import EncodedChunk
from mhmoe_np.data.store import TOKENIZER, Shard, index_of, sha256_of, shard_name
from mhmoe_np.errors import UserError
from mhmoe_np.storage.files import temporary_of, write_atomically, write_json
from mhmoe_np.storage.reading import read_json

SHARD_TOKENS = 1 << 24  # a shard is full when it has so many, or more: see `Shards`
PROGRESS = "progress.json"  # of a preparation that is not done


class Record(NamedTuple):
    """A whole shard, and how many pieces of training text are in it."""

    domain: str
    pieces: int
    shard: Shard


class Shards:
    """The shards of a preparation, and the file that says which are whole."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Take over what an interrupted preparation of the same identity has done."""
        self._folder, self._path = folder, folder / PROGRESS
        self._identity = identity
        self._records = self._taken_over()
        kept = {PROGRESS} | {
            name for record in self._records for name in (record.shard.file, record.shard.index)
        }
        for entry in folder.iterdir():
            if entry.name not in kept:
                entry.unlink()
        if not self._records:
            (folder.parent / TOKENIZER).unlink(missing_ok=True)

    def _taken_over(self) -> list[Record]:
        try:
            found = read_json(self._path)
            if found["identity"] != self._identity:
                return []
            records = [
                Record(domain, pieces, Shard.model_validate(shard))
                for domain, pieces, shard in found["shards"]
            ]
            for record in records:
                for name, wanted in record.shard.sha256_of_file.items():
                    if sha256_of(self._folder / name) != wanted:
                        return []
        except (UserError, KeyError, TypeError, ValueError):
            return []
        return records

    def of(self, domain: str) -> list[Record]:
        """The whole shards of a domain."""
        return [record for record in self._records if record.domain == domain]

    def end(self) -> None:
        """The preparation is done."""
        self._path.unlink(missing_ok=True)

    def write(
        self,
        domain: str,
        chunks: Iterator[EncodedChunk],
        lengths: deque[int],
        *,
        width: int,
        is_first: bool,
    ) -> None:
        """Write a domain's chunks, behind the shards that it has. A shard holds whole chunks.

        lengths: the pieces of each chunk, known when it comes.
        is_first: whether this is the store's first domain, before which nothing ends.
        """
        number = len(self.of(domain))
        drop = is_first and number == 0
        shard: _OpenShard | None = None
        try:
            for chunk in chunks:
                if shard is None:
                    shard = _OpenShard(self._folder / shard_name(domain, number), width)
                shard.add(chunk, lengths.popleft(), drop=drop)
                drop = False
                if shard.tokens >= SHARD_TOKENS:
                    self._keep(domain, shard)
                    shard, number = None, number + 1
            if shard is not None:
                self._keep(domain, shard)
        finally:
            if shard is not None:
                shard.discard()

    def _keep(self, domain: str, shard: _OpenShard) -> None:
        self._records.append(Record(domain, shard.pieces, shard.close()))
        value = {
            "identity": self._identity,
            "shards": [
                [record.domain, record.pieces, record.shard.model_dump()] for record in self._records
            ],
        }
        write_atomically(self._path, lambda path: write_json(path, value))


class _OpenShard:
    """A shard in the making."""

    def __init__(self, path: Path, width: int) -> None:
        self._path, self._temporary, self._width = path, temporary_of(path), width
        self._file = self._temporary.open("wb")
        self._sum = hashlib.sha256()
        self._starts = array("Q")
        self.tokens = self.pieces = 0

    def add(self, chunk: EncodedChunk, pieces: int, *, drop: bool) -> None:
        """Append a chunk; drop: without the end of text that it begins with."""
        ids = memoryview(chunk.ids)[self._width if drop else 0 :]
        try:
            self._file.write(ids)
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._sum.update(ids)
        self._starts.extend(start + self.tokens - drop for start in chunk.starts)
        self.tokens += len(ids) // self._width
        self.pieces += pieces

    def close(self) -> Shard:
        """Give the files their names, and say what is in them."""
        self._file.close()
        index = np.array(self._starts, dtype="<u8").tobytes()
        index_path = self._path.with_name(index_of(self._path.name))
        write_atomically(index_path, lambda path: path.write_bytes(index))
        write_atomically(self._path, lambda _: None)
        return Shard(
            file=self._path.name,
            sha256=self._sum.hexdigest(),
            tokens=self.tokens,
            documents=len(self._starts),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def discard(self) -> None:
        """Remove what is not whole."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
