"""Reading text: a domain is a named source of documents."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.storage.reading import check_regular, reason_of

EMBEDDED_NAMES = ("books", "speech", "lexicon")
SUFFIXES = (".txt", ".jsonl")
WILDCARDS = frozenset("*?[")
BYTES_PER_BYTE = 4  # about: a text's bytes, its characters, its documents, and work on them
DOCUMENT_SEPARATOR = re.compile(r"(?:\r?\n){3,}")


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


def read_domain(name: str, path: str | Path) -> Domain:
    """Read a `.txt` or `.jsonl` file, all of them below a folder, or those a glob pattern matches.

    A `.txt` file holds documents separated by three or more newlines; a line of a `.jsonl` file
    holds one as `{"text": ...}`. Files are read in the order of their paths; blank documents are
    dropped.

    Raises UserError: nothing is there, a file is of another kind, is not UTF-8 or has a bad line,
    there is no document, or the text is too large for the memory that is free.
    """
    return _read([(name, path)])[0]


def read_domains(paths: Sequence[str]) -> list[Domain]:
    """Read one domain per path, named by `domain_names`.

    Raises UserError: as `read_domain`.
    """
    return _read(list(zip(domain_names(paths), paths, strict=True)))


def _read(named: Sequence[tuple[str, str | Path]]) -> list[Domain]:
    """Read domains by name and path, unless all together are too large."""
    found = [(name, path, _find_files(path)) for name, path in named]
    size = sum(check_regular(file).st_size for *_, files in found for file in files)
    places = ", ".join(str(path) for _, path, _ in found[:3]) + (" ..." if len(found) > 3 else "")
    check_memory(
        BYTES_PER_BYTE * size,
        f"{places}: {size / 1e9:,.1f} GB of text, read at once, need about",
        remedy="give less text",
    )
    return [_join(name, map(_read_file, files), source=str(path)) for name, path, files in found]


def embedded_domains() -> list[Domain]:
    """Read the corpus that ships with the package: books, speech, lexicon."""
    corpus = resources.files("mhmoe_np.data.corpus")
    return [_join(name, [_read_file(corpus / f"{name}.txt")], source=name) for name in EMBEDDED_NAMES]


def chosen_domains(paths: Sequence[str]) -> list[Domain]:
    """The domains of these paths; without any, the embedded corpus.

    Raises UserError: as `read_domain`.
    """
    return read_domains(paths) if paths else embedded_domains()


def domain_names(paths: Sequence[str]) -> list[str]:
    """Name a domain for each path by its stem; equal stems are told apart by -2, -3 and so on.

    The stem of a glob pattern is that of its last part without wildcards.
    """
    names: list[str] = []
    for path in paths:
        stem = name = _stem(path)
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _stem(path: str) -> str:
    # The absolute path gives a name to "." and to "*.txt" too.
    place = Path(os.path.abspath(path))
    if not place.exists():
        while WILDCARDS & set(place.name):
            place = place.parent
    return place.name if place.is_dir() else place.stem


def _find_files(path: str | Path) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        files = [file for file in _sorted_files(place.rglob("*")) if _has_text_suffix(file)]
        if not files:
            raise UserError(f"{path}: has no .txt or .jsonl file in it; add one")
    elif place.exists():
        check_regular(place)
        files = [place]
    elif WILDCARDS & set(str(path)):
        files = _sorted_files(map(Path, glob.glob(str(path), recursive=True)))
        if not files:
            raise UserError(f"{path}: matches no file; check the pattern")
    else:
        raise UserError(f"{path}: no such file or folder; check the path")
    for file in files:
        if not _has_text_suffix(file):
            raise UserError(f"{file}: is neither .txt nor .jsonl; convert or rename it")
    return files


def _sorted_files(paths: Iterable[Path]) -> list[Path]:
    # A set, for a pattern with two ** matches a file more than once.
    return sorted({path for path in paths if path.is_file()})


def _has_text_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class _FileText:
    documents: list[str]
    originals: list[str]  # what the counts are of


def _read_file(file: Traversable) -> _FileText:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 at byte offset {error.start}; convert it to UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check the file") from None
    if file.name.lower().endswith(".jsonl"):
        documents = _parse_json_lines(text, source=str(file))
        return _FileText(documents, documents)
    return _FileText(DOCUMENT_SEPARATOR.split(text), [text])


def _parse_json_lines(text: str, *, source: str) -> list[str]:
    # Not splitlines: a JSON string may hold U+2028 and the like as they are.
    return [
        _parse_json_line(line, place=f"{source}:{number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parse_json_line(line: str, *, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{place}: is not JSON: {reason_of(error)}; write {{"text": "..."}}') from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: has no string "text"; write {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{place}: "text" holds half a surrogate pair (\\ud800 to \\udfff); remove it'
        ) from None
    return text


def _join(name: str, files: Iterable[_FileText], *, source: str) -> Domain:
    files = list(files)
    documents = tuple(document for file in files for document in file.documents if document.strip())
    if not documents:
        raise UserError(f"{source}: has no document with text in it; add some text")
    originals = [text for file in files for text in file.originals]
    return Domain(
        name=name,
        documents=documents,
        byte_count=sum(len(text.encode()) for text in originals),
        word_count=sum(len(text.split()) for text in originals),
    )
