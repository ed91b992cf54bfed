"""What several commands are told about text, and say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mhmoe_np.errors import UserError

if TYPE_CHECKING:
    from mhmoe_np.data.store import Shared

Command = TypeVar("Command", bound=Callable[..., Any])


def text_key_option(command: Command) -> Command:
    """`--text-key KEY`."""
    return click.option(
        "--text-key",
        default="text",
        show_default=True,
        metavar="KEY",
        help="Where a line of JSON has its text; the column of a .parquet file.",
    )(command)


def named(values: Sequence[str], *, option: str, value: str) -> dict[str, str]:
    """NAME=VALUE of a repeatable option, as a table.

    Raises UserError: one is not of this form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in values:
        name, equals, rest = text.partition("=")
        if not equals or not name or not rest:
            raise UserError(f"{option} {text[:60]!r}: must be NAME={value}")
        if name in found:
            raise UserError(f"{option}: the name {name[:60]!r} is given twice")
        found[name] = rest
    return found


def lines_in_both_text(found: Shared) -> str:
    """A line on how much of the held-out text stands in the training text as well."""
    about = "about " if found.is_estimate else ""
    share = found.shared / max(1, found.held_out_lines)
    return (
        f"{about}{found.shared:,} of {found.held_out_lines:,} held-out lines ({share:.1%}) are in "
        "the training text too"
    )
