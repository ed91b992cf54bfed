"""Whether there is disk enough, before hours are spent on what will not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from mhmoe_np.errors import UserError


def check_disk(folder: Path, needed: int, what: str, *, remedy: str) -> None:
    """Refuse what needs more bytes than are free in `folder`; `needed` must not be more than it takes.

    Raises UserError: "`what` need(s) so much of disk or more, and so much is free in it; `remedy`".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} {needed / 1e9:,.1f} GB of disk or more, and {free / 1e9:,.1f} GB are free in "
            f"{folder}; {remedy}"
        )
