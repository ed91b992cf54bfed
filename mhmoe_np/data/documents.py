"""Text that is read at once: a domain is a named source of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhmoe_np.data.read_file import TEXT_KEY, TextCounts, read_pieces
from mhmoe_np.data.sources import Source, embedded_sources, find_files
from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory

BYTES_PER_BYTE = 4  # about: a text's bytes, its characters, its documents, and work on them
BYTES_BETWEEN_CHECKS = 1 << 28  # of what is read from a compressed file


@dataclass(frozen=True)
class Domain:
    """A named source of text.

    The counts are of the original text, so they do not depend on how it is cut: a whole `.txt` file
    with its separators, the text fields alone of a `.jsonl` file.
    """

    name: str
    documents: tuple[str, ...]  # none is blank
    byte_count: int  # bytes of UTF-8
    word_count: int  # runs of characters other than white space


def read_domain(name: str, path: str | Path, *, text_key: str = TEXT_KEY) -> Domain:
    """Read the text of a file, of all files below a folder, or of those that a glob pattern matches.

    `read_pieces` says which files those are, and what a document is in each. Files are read in the
    order of their paths; blank documents are dropped.

    text_key: where the text stands in a line of JSON, or the column of a table.

    Raises UserError: nothing is there, a file is of another kind, is damaged, is not UTF-8 or has a bad
    line, there is no document, or the text is too large for the memory that is free.
    """
    return _read([(Source(name, tuple(find_files(path))), str(path))], text_key)[0]


def embedded_domains() -> list[Domain]:
    """Read the corpus that ships with the package: books, speech, lexicon."""
    return _read([(source, source.name) for source in embedded_sources()], TEXT_KEY)


def _read(found: Sequence[tuple[Source, str]], text_key: str) -> list[Domain]:
    """Read domains, each with what a message calls it, unless all together are too large."""
    places = ", ".join(place for _, place in found[:3]) + (" ..." if len(found) > 3 else "")
    _check_room(sum(source.size for source, _ in found), places)
    return [_read_source(source, place, text_key) for source, place in found]


def _check_room(size: int, places: str) -> None:
    check_memory(
        BYTES_PER_BYTE * size,
        f"{places}: {size / 1e9:,.1f} GB of text, read at once, need about",
        remedy="give less text",
    )


def _read_source(source: Source, place: str, text_key: str) -> Domain:
    parts: list[list[str]] = []
    counts, checked = TextCounts(), BYTES_BETWEEN_CHECKS
    for file in source.files:
        for piece in read_pieces(file, text_key=text_key, counts=counts):
            assert isinstance(piece.content, str)
            if piece.begins:
                parts.append([])
            parts[-1].append(piece.content)
            if counts.bytes > checked:
                # Compressed text is larger than its file.
                _check_room(BYTES_BETWEEN_CHECKS, place)
                checked += BYTES_BETWEEN_CHECKS
    if not parts:
        raise UserError(f"{place}: has no document with text in it; add some text")
    return Domain(source.name, tuple(map("".join, parts)), counts.bytes, counts.words)
