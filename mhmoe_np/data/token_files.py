"""Token files of other programs, as documents of ids.

nanoGPT: ids alone, uint16. llm.c: a header of 256 int32 (magic number, version, count), then ids.
Megatron: ids in `.bin` and an `.idx` beside it, which says the type of the ids and where documents end.
In the first two an end of text separates the documents; so it may in the third.

Source   nanoGPT data/*/prepare.py, llm.c dev/data/data_common.py, Megatron-LM indexed_dataset.py
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.data.pieces import PIECE, Piece
from mhmoe_np.errors import UserError
from mhmoe_np.storage.reading import check_regular, reason_of
from mhmoe_np.types import IntArray

LLM_C_HEADER = 256  # int32
LLM_C_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic number and version
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEAD = struct.Struct("<QBQQ")  # version, type, sequences, documents and one more
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class _TokenFile(NamedTuple):
    """An open file."""

    token_W: IntArray
    ends: IntArray | None = None  # of its documents; None: an end of text says it


def read_token_pieces(file: Path, *, end_of_text: int, id_count: int) -> Iterator[Piece]:
    """The documents of a token file, without their ends of text; a long one comes in pieces.

    id_count: ids that the tokenizer has.

    Raises UserError: the file cannot be read, is damaged, or holds an id that the tokenizer lacks.
    """
    opened = _open(file)
    ends = opened.ends if opened.ends is not None else np.array([len(opened.token_W)])
    first = 0
    for end in ends.tolist():
        begins = True
        for place in range(first, end, PIECE):
            token_W = np.asarray(opened.token_W[place : min(end, place + PIECE)])
            _check_ids(file, token_W, place, id_count)
            parts = np.split(token_W, np.flatnonzero(token_W == end_of_text))
            for number, part in enumerate(parts):
                if number:
                    part, begins = part[1:], True
                if len(part):
                    yield Piece(part, begins)
                    begins = False
        first = end


def _check_ids(file: Path, token_W: IntArray, place: int, id_count: int) -> None:
    bad = np.flatnonzero((token_W < 0) | (token_W >= id_count))
    if len(bad):
        raise UserError(
            f"{file}: token {place + int(bad[0]):,} is id {int(token_W[bad[0]])}, and the tokenizer "
            f"has {id_count} ids; give the one that the file was made with"
        )


def _open(file: Path) -> _TokenFile:
    check_regular(file)
    index = file.with_suffix(".idx")
    try:
        if index.exists():
            return _open_megatron(file, index)
        with file.open("rb") as opened:
            head = opened.read(4 * LLM_C_HEADER)
        magic = np.frombuffer(head, "<i4")[:3].tolist() if len(head) == 4 * LLM_C_HEADER else []
        if magic and magic[0] in {number for number, _ in LLM_C_TYPES}:
            return _open_llm_c(file, magic)
        return _TokenFile(_map(file, "<u2", offset=0))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {reason_of(error)}; check the file") from None


def _map(file: Path, dtype: str, *, offset: int, count: int | None = None) -> IntArray:
    """The ids of a file from `offset` on; all, or `count` if they are all."""
    width = np.dtype(dtype).itemsize
    size = file.stat().st_size - offset
    if size <= 0 or size % width or (count is not None and size != count * width):
        expected = "a whole number of them" if count is None else f"{count:,} ids"
        raise UserError(
            f"{file}: has {size:,} bytes of ids of {width} bytes each, not {expected}; "
            "take another copy"
        )
    mapped: np.memmap[Any, Any] = np.memmap(file, dtype=dtype, mode="r", offset=offset)
    return mapped


def _open_llm_c(file: Path, magic: list[int]) -> _TokenFile:
    number, version, count = magic
    dtype = LLM_C_TYPES.get((number, version))
    if dtype is None:
        raise UserError(
            f"{file}: is an llm.c file of version {version}, which is not known; convert it"
        )
    return _TokenFile(_map(file, dtype, offset=4 * LLM_C_HEADER, count=count))


def _open_megatron(file: Path, index: Path) -> _TokenFile:
    head_size = len(MEGATRON_MAGIC) + MEGATRON_HEAD.size
    with index.open("rb") as opened:
        head = opened.read(head_size)
    if len(head) < head_size or not head.startswith(MEGATRON_MAGIC):
        raise UserError(f"{index}: is no index of Megatron's; remove it if {file.name} has none")
    version, code, sequences, boundaries = MEGATRON_HEAD.unpack(head[len(MEGATRON_MAGIC) :])
    dtype = MEGATRON_TYPES.get(code)
    if version != 1 or dtype is None:
        raise UserError(f"{index}: is of version {version} with type {code}; convert its file")
    size = head_size + 12 * sequences + 8 * boundaries
    if index.stat().st_size != size or not boundaries:
        raise UserError(f"{index}: has {index.stat().st_size:,} bytes, not {size:,}; take another copy")
    length_of_sequence: IntArray = np.memmap(index, "<i4", "r", offset=head_size, shape=(sequences,))
    first_sequence: IntArray = np.memmap(index, "<i8", "r", head_size + 12 * sequences, (boundaries,))
    end_of_sequence = np.concatenate([[0], np.cumsum(length_of_sequence, dtype=np.int64)])
    in_order = bool(np.all(np.diff(first_sequence) >= 0)) and int(first_sequence[-1]) <= sequences
    if int(first_sequence[0]) != 0 or not in_order or int(length_of_sequence.min(initial=0)) < 0:
        raise UserError(f"{index}: its documents are not in order; take another copy")
    ids = _map(file, dtype, offset=0, count=int(end_of_sequence[-1]))
    return _TokenFile(ids, end_of_sequence[first_sequence[1:]])
