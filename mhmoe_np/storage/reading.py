"""Reading small text files that a person may have named or edited: each fault is one line.

A path may lead to a pipe that never ends, a device, a file of many gigabytes; its text may be nested a
million deep or hold an integer of a million digits. Nothing of that may hang or raise anything but
UserError.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from mhmoe_np.errors import UserError

LARGEST = 1 << 28  # bytes of a settings file or a tokenizer; the largest tokenizers have some 20 MB
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: Path) -> os.stat_result:
    """What the system says of a regular file.

    Raises UserError: there is none, it cannot be looked at, or it is something else than a file.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None
    kind = KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is not None:
        raise UserError(f"{path}: is {kind}; give a file")
    return found


def read_bytes(path: Path, *, most: int = LARGEST) -> bytes:
    """The whole content of a regular file of at most `most` bytes.

    Raises UserError: missing, not a regular file, too large, or the system refuses.
    """
    size = check_regular(path).st_size
    if size > most:
        raise UserError(f"{path}: has {size:,} bytes; at most {most:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def read_text(path: Path) -> str:
    """The content of a regular UTF-8 file.

    Raises UserError: as `read_bytes`, or it is not UTF-8.
    """
    return decoded(read_bytes(path), source=str(path))


def decoded(content: bytes, *, source: str) -> str:
    """UTF-8 as text; `source` names where it came from.

    Raises UserError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: is not UTF-8 at byte offset {error.start}; convert it to UTF-8"
        ) from None


def parse_json(text: str, *, source: str) -> Any:
    """A JSON value; `source` names where the text came from.

    Raises UserError: not JSON, nested too deep, or with an integer too long to read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read as JSON: {reason_of(error)}") from None


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path), source=str(path))


def parse_toml(text: str, *, source: str) -> dict[str, Any]:
    """The tables of a TOML text; `source` names where it came from.

    Raises UserError: not TOML, nested too deep, or with an integer too long to read.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read as TOML: {reason_of(error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises UserError: as `read_text` and `parse_toml`.
    """
    return parse_toml(read_text(path), source=str(path))


def reason_of(error: Exception) -> str:
    """What an error says, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "integer string conversion" in str(error):
        return "holds an integer of too many digits"
    return str(error)
