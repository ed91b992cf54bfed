"""Whether there is disk enough, before hours are spent on what will not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import size_text


def check_disk(folder: Path, needed: int, what: str, *, remedy: str) -> None:
    """Refuse what needs more bytes than are free in `folder`; `needed` must not be more than it takes.

    Raises UserError: "`what` need(s) so much of disk or more, and so much is free in it; `remedy`".
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} {size_text(needed)} of disk or more, and {size_text(free)} are free in {folder}; "
            f"{remedy}"
        )
