"""Writing to the terminal: what cannot be shown is escaped, what is no JSON number is null."""

from __future__ import annotations

import json
import math
import shutil
import unicodedata
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def printable(text: str) -> str:
    """The text on one line: line breaks, control characters and the like as backslash escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def visible(text: str) -> str:
    """A text of several lines as a terminal can be given it: control characters as backslash escapes.

    Line breaks and tabs stay.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        else printable(character)
        for character in text
    )


def duration(seconds: float) -> str:
    """As people say it: 42 s, 5 min, 2 h 10 min, 3 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def print_json(value: Any) -> None:
    """Print indented JSON; a float that is not finite, which JSON does not know, as null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, least_width: int = 1) -> Console:
    """Standard output as tables see it, at least so many columns wide; see `show`.

    The size is given, for the library stumbles over odd values of COLUMNS and LINES.
    """
    from rich.console import Console

    size = shutil.get_terminal_size()
    return Console(width=max(size.columns, least_width), height=size.lines)


def show(screen: Console, table: Table) -> None:
    """Print a table. The library itself would end the program over a closed pipe."""
    with screen.capture() as capture:
        screen.print(table)
    click.echo(capture.get(), nl=False)
