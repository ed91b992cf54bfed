"""Texts as the documents that they are read as."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mhmoe_np.data.read_file import TEXT_KEY, TextCounts, read_pieces
from mhmoe_np.data.sources import embedded_sources, find_files


class Documents(NamedTuple):
    """What files hold."""

    documents: tuple[str, ...]
    counts: TextCounts


def read_documents(path: str | Path, *, text_key: str = TEXT_KEY) -> Documents:
    """Those of a file, a folder or a pattern."""
    return _read(find_files(path), text_key)


def embedded_documents() -> dict[str, Documents]:
    """Those of each domain of the corpus that ships with the package."""
    return {source.name: _read(source.files, TEXT_KEY) for source in embedded_sources()}


def _read(files: Iterable[Path], text_key: str) -> Documents:
    found: list[str] = []
    counts = TextCounts()
    for file in files:
        for piece in read_pieces(file, text_key=text_key, counts=counts):
            assert isinstance(piece.content, str)
            if piece.begins:
                found.append("")
            found[-1] += piece.content
    return Documents(tuple(found), counts)
