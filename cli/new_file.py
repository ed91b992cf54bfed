"""The check of a file that is to be made, before the work that fills it."""

from __future__ import annotations

import os
from pathlib import Path

from mhmoe_np.errors import UserError


def check_new_file(path: Path, *, option: str) -> None:
    """Refuse a file that is there already, or whose folder is not.

    Raises UserError: the line names the option to change.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; choose another {option}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: its folder does not exist; create it first")
