"""The option that names a directory to be made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mhmoe_np.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])


def _absent(_context: click.Context, _option: click.Parameter, out: Path) -> Path:
    if os.path.lexists(out):  # a link to nothing too: the new directory would take its place
        raise UserError(f"{out}: exists already; choose another --out")
    return out


def out_option(command: Command) -> Command:
    """`--out DIR`, which must not exist yet."""
    return click.option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        callback=_absent,
        help="New directory.",
    )(command)
