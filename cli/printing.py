"""Writing to the terminal: what cannot be shown is escaped, what is no JSON number is null."""

from __future__ import annotations

import json
import math
import shutil
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


def tell(line: str) -> None:
    """Say something on standard error.

    Only a reader that went away ends the command; one that writes to a full disk does not.
    """
    try:
        click.echo(line, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


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
