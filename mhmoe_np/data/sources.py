"""Where text is: the files behind a path, a folder or a pattern, and the names of their domains."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from mhmoe_np.errors import UserError
from mhmoe_np.storage.reading import check_regular

EMBEDDED_NAMES = ("books", "speech", "lexicon")
TEXT_SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
PARQUET, TOKENS = ".parquet", ".bin"
WILDCARDS = frozenset("*?[")


class Source(NamedTuple):
    """A domain's name and the files that it is read from, in order."""

    name: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of the files as they lie on the disk."""
        return sum(check_regular(file).st_size for file in self.files)


def find_sources(paths: Sequence[str], domains: Mapping[str, str] | None = None) -> list[Source]:
    """The sources of unnamed paths and of named ones; without any, the embedded corpus.

    paths: files, folders or patterns; `domain_names` names them.
    domains: name -> path, after those.

    Raises UserError: nothing is there, a file is of another kind, or a name is twice there or unfit.
    """
    if not paths and not domains:
        return embedded_sources()
    named = [*zip(domain_names(paths), paths, strict=True), *(domains or {}).items()]
    names = [name for name, _ in named]
    for name in names:
        check_domain_name(name)
        if names.count(name) > 1:
            raise UserError(f"domain {name[:60]!r}: is given twice; choose another name")
    return [Source(name, tuple(find_files(path))) for name, path in named]


def embedded_sources() -> list[Source]:
    """The corpus that ships with the package: books, speech, lexicon."""
    corpus = resources.files("mhmoe_np.data.corpus")
    return [Source(name, (Path(str(corpus / f"{name}.txt")),)) for name in EMBEDDED_NAMES]


def check_domain_name(name: str) -> None:
    """Refuse a name that no file can have.

    Raises UserError.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 200:
        raise UserError(f"domain {name[:60]!r}: files get this name; choose a plain, shorter one")


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
    if place.is_dir():
        return place.name
    return Path(place.stem).stem if place.suffix.lower() in COMPRESSIONS else place.stem


def find_files(path: str | Path) -> list[Path]:
    """The files of text that a path means, in the order of their paths.

    A folder means those below it; a file of tokens (`.bin`) must be named or matched by a pattern.

    Raises UserError: there is none, or a file is of another kind.
    """
    place = Path(path)
    if place.is_dir():
        files = [file for file in _sorted_files(place.rglob("*")) if _is_text(file)]
        if not files:
            raise UserError(f"{path}: has no .txt, .jsonl or .parquet file in it; add one")
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
        if not _is_text(file) and not is_token_file(file):
            raise UserError(
                f"{file}: is none of .txt, .jsonl (also .gz, .zst), .parquet and .bin; convert or "
                "rename it"
            )
    return files


def _sorted_files(paths: Iterable[Path]) -> list[Path]:
    # A set, for a pattern with two ** matches a file more than once.
    return sorted({path for path in paths if path.is_file()})


def text_suffix(file: Path) -> str:
    """`.txt`, `.jsonl`, `.parquet` or another: the last suffix that names no compression."""
    compressed = file.suffix.lower() in COMPRESSIONS
    return (Path(file.stem) if compressed else file).suffix.lower()


def _is_text(file: Path) -> bool:
    return text_suffix(file) in TEXT_SUFFIXES or file.suffix.lower() == PARQUET


def is_token_file(file: Path) -> bool:
    """Whether a file holds token ids, by its name."""
    return file.suffix.lower() == TOKENS
