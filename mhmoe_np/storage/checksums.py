"""Whether the files of a folder are, byte by byte, as they were written.

`checksums.json` says it for all files of the folder, with the XXH3 128 that `xxhsum -H2` computes too:
a sum against damage, not against an enemy, and so fast that it costs nothing beside the disk. The file
has one form only, so that a bit flipped in itself shows as well.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from mhmoe_np.errors import Damaged, UserError
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.files import sync_path, write_atomically, write_text
from mhmoe_np.storage.reading import read_json, read_text

CHECKSUMS = "checksums.json"
ALGORITHM = "xxh3_128"
PIECE = 1 << 25  # bytes that are mapped at once, and between two words about how far a sum is


def checksum(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Of a file's content, in hexadecimal.

    on_bytes: told how many more bytes were looked at, as they are.
    """
    total, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, PIECE):
            length = min(PIECE, size - start)
            with (
                mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as content,
                memoryview(content) as piece,
            ):
                total.update(piece)
            if on_bytes is not None:
                on_bytes(length)
    return total.hexdigest()


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write `checksums.json` for these files of a directory in the making, and flush them to the disk.

    The disk is waited for in a thread of its own: the sums are ready before it is.

    Raises OSError: the disk is full or refuses.
    """
    write_text(folder / CHECKSUMS, _text(_flushed_sums(folder, names)))


def seal_in_place(folder: Path, names: Iterable[str]) -> None:
    """`seal` for a directory in use: `checksums.json` is there whole or not at all."""
    _replace(folder, _flushed_sums(folder, names))


def _flushed_sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    paths = {name: folder / name for name in names}
    with ThreadPoolExecutor(1) as thread:
        flushed = [thread.submit(sync_path, path) for path in paths.values()]
        sums = {name: checksum(path) for name, path in paths.items()}
        for future in flushed:
            future.result()
    return sums


def reseal(folder: Path, name: str) -> None:
    """Let `checksums.json` speak of one more file, as it is now.

    Raises OSError: the disk is full or refuses; `checksums.json` is as it was.
    """
    _replace(folder, {**_known(folder), name: checksum(folder / name)})


def unseal(folder: Path, name: str) -> None:
    """Let `checksums.json` no longer speak of a file that is about to change.

    Raises OSError: as `reseal`.
    """
    sums = _known(folder)
    if sums.pop(name, None) is not None:
        _replace(folder, sums)


def _replace(folder: Path, sums: Mapping[str, str]) -> None:
    text = _text(sums)
    write_atomically(folder / CHECKSUMS, lambda temporary: write_text(temporary, text))


def sealed_files(folder: Path) -> set[str]:
    """The files that the folder's `checksums.json` speaks of; none where there is no such file.

    Raises Damaged: it is not one.
    """
    return set(_known(folder))


def _known(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    return _sums(path) if path.exists() else {}


def verify(
    folder: Path, on_progress: OnProgress = unseen, *, only: Collection[str] | None = None
) -> bool:
    """Whether the folder has checksums; if so, all hold.

    on_progress: counts bytes.
    only: the files that are looked at; None: all that have checksums.

    Raises Damaged: a file is missing or not as it was written; the line names it.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return False
    expected = _sums(path)
    looked_at = {name: value for name, value in expected.items() if only is None or name in only}
    for file in (folder / name for name in looked_at):
        if not file.is_file():
            raise Damaged(f"{file}: no such file, but {CHECKSUMS} speaks of it; put a copy back")
    size = sum((folder / name).stat().st_size for name in looked_at)
    checked = counting(on_progress, f"checking {folder.absolute().name}", size)
    for name, wanted in looked_at.items():
        file = folder / name
        if checksum(file, checked) != wanted:
            raise Damaged(
                f"{file}: damaged: its checksum is not that of {path}; take another copy (or, if it "
                f"was changed on purpose, remove {CHECKSUMS})"
            )
    # Read again as a text: what JSON passes over, as blanks, counts too.
    if read_text(path) != _text(expected):
        raise Damaged(f"{path}: damaged: not as it was written")
    return True


def _text(sums: Mapping[str, str]) -> str:
    value = {"algorithm": ALGORITHM, "files": dict(sorted(sums.items()))}
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _sums(path: Path) -> dict[str, str]:
    try:
        value = read_json(path)
    except UserError as error:
        raise Damaged(str(error)) from None
    files = value.get("files") if isinstance(value, dict) else None
    if (
        not isinstance(files, dict)
        or value.get("algorithm") != ALGORITHM
        or not all(isinstance(found, str) for found in files.values())
    ):
        raise Damaged(f"{path}: damaged: holds no checksums ({ALGORITHM})")
    return files
