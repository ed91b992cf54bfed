"""The token store: shards of ids, what is in them, and the text held out of them.

    tokenizer.json
    data/store.json          the header below
    data/NAME-00000.bin      ids of a domain's training documents, little-endian; NAME-00001.bin goes on
    data/NAME-00000.index    uint64: where in the shard each document begins that begins there
    validation/NAME.jsonl    its held-out documents, a JSON line each
    checksums.json           of all of these

An end of text precedes every document but the store's first, so that the shards, one after the other,
are one stream. A run folder is laid out the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from mhmoe_np.data.encoder import DTYPES
from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import Count, Natural, Positive, PositiveFactor, StrictModel, first_fault
from mhmoe_np.storage.checksums import verify
from mhmoe_np.storage.reading import check_regular, read_json
from mhmoe_np.types import IntArray

TOKENIZER, DATA, VALIDATION = "tokenizer.json", "data", "validation"
HEADER = "store.json"
VERSION: Literal[3] = 3
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(StrictModel):
    """A file of ids and its index."""

    file: Annotated[str, Field(pattern=r"^[^/\x00]+\.bin$")]
    sha256: Digest
    tokens: Natural
    documents: Natural  # that begin here
    index_sha256: Digest

    @property
    def index(self) -> str:
        """The name of the index's file."""
        return index_of(self.file)

    @property
    def sha256_of_file(self) -> dict[str, str]:
        """The hash of each of its two files, by name."""
        return {self.file: self.sha256, self.index: self.index_sha256}


class StoredDomain(StrictModel):
    """A domain: its training tokens, and what its text was."""

    name: str
    weight: PositiveFactor | None  # its share of a batch, relative to the others'; none: by its size
    sources: list[str]
    size: (
        Count  # of all its documents, held out or not: bytes of UTF-8, or tokens where it came as such
    )
    documents: Count  # for training
    held_out_documents: Count
    tokens: Count
    shards: list[Shard]


class Shared(StrictModel):
    """Lines of the held-out text that stand in the training text as well; blank ones do not count."""

    held_out_lines: Count
    shared: Count
    is_estimate: bool


class StoreHeader(StrictModel):
    """What a store says of itself."""

    format: Literal["mhmoe-np token store"] = "mhmoe-np token store"
    version: Literal[3] = VERSION
    dtype: Literal["uint16", "uint32"]
    byte_order: Literal["little"] = "little"
    tokenizer_sha256: Digest
    vocab_size: Positive
    end_of_text: Natural
    lines_in_both: Shared
    domains: Annotated[list[StoredDomain], Field(min_length=1)]

    @property
    def tokens(self) -> int:
        """Of all domains."""
        return sum(domain.tokens for domain in self.domains)


class TokenStream:
    """The ids of shards, one after the other, mapped into memory: token_W."""

    def __init__(self, shards: Sequence[IntArray]) -> None:
        """Join arrays of ids, [W] each and none empty."""
        self._shards = [np.asarray(shard) for shard in shards]  # a memmap costs a Python call more
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    @classmethod
    def joined(cls, streams: Sequence[TokenStream]) -> TokenStream:
        """Several streams as one."""
        return cls([shard for stream in streams for shard in stream._shards])

    def __len__(self) -> int:
        """Count the ids."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: IntArray) -> IntArray:
        """The ids at these places, int64, in the shape of `indices`."""
        shard_of_index = np.searchsorted(self._ends, indices, side="right")
        found = np.empty(indices.shape, dtype=np.int64)
        for number in np.unique(shard_of_index).tolist():
            here = shard_of_index == number
            first = int(self._ends[number - 1]) if number else 0
            found[here] = self._shards[number][indices[here] - first]
        return found


def index_of(shard_file: str) -> str:
    """The name of the index beside a shard."""
    return f"{shard_file.removesuffix('.bin')}.index"


def shard_name(domain: str, number: int) -> str:
    """The name of a domain's shard, counted from 0."""
    return f"{domain}-{number:05}.bin"


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store, or a run with its own."""
    return (folder / DATA / HEADER).is_file()


def read_header(folder: Path) -> StoreHeader:
    """What the store in `folder` says of itself.

    Raises UserError: there is none, or it is of another version or edited.
    """
    path = folder / DATA / HEADER
    try:
        return StoreHeader.model_validate(read_json(path))
    except ValidationError as error:
        known = [*StoreHeader.model_fields, *StoredDomain.model_fields, *Shard.model_fields]
        raise UserError(
            f"{path}: {first_fault(error, known)}; this release reads version {VERSION}: "
            "prepare the text again"
        ) from None


def check_store(folder: Path, on_progress: OnProgress = unseen) -> StoreHeader:
    """Look at every byte of a store: its files' checksums, and the sha256 of each shard.

    on_progress: counts the bytes of the shards.

    Raises UserError: a file is missing, or not as it was written; the line names it.
    """
    if not verify(folder):
        raise UserError(f"{folder}: has no checksums.json; prepare the text again")
    header = read_header(folder)
    sha256_of_file = {
        folder / DATA / name: wanted
        for domain in header.domains
        for shard in domain.shards
        for name, wanted in shard.sha256_of_file.items()
    }
    size_of_file = {path: check_regular(path).st_size for path in sha256_of_file}
    stage = f"checking the shards of {folder.absolute().name}"
    checked = counting(on_progress, stage, sum(size_of_file.values()))
    for path, wanted in sha256_of_file.items():
        if sha256_of(path) != wanted:
            raise Damaged(f"{path}: damaged: its sha256 is not that of {HEADER}; take another copy")
        checked(size_of_file[path])
    return header


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal.

    Raises UserError: there is no such file.
    """
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_streams(folder: Path, *, tokenizer_sha256: str) -> list[TokenStream]:
    """The training tokens of each domain of a store, read-only.

    Raises UserError: a shard is missing or of the wrong size, or the store was made with another
    tokenizer than that of hash `tokenizer_sha256`.
    """
    header = read_header(folder)
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{folder / DATA / HEADER}: was made with another tokenizer; prepare the text again"
        )
    return [
        TokenStream([_map(folder / DATA, shard, header) for shard in domain.shards])
        for domain in header.domains
    ]


def _map(folder: Path, shard: Shard, header: StoreHeader) -> IntArray:
    path, dtype = folder / shard.file, DTYPES[header.dtype]
    size = check_regular(path).st_size
    if size != shard.tokens * dtype.itemsize:
        raise UserError(
            f"{path}: has {size} bytes, not {shard.tokens * dtype.itemsize}; prepare the text again"
        )
    return np.memmap(path, dtype=dtype, mode="r")
