"""Libraries that only some of the work needs, each behind an extra of the package."""

from __future__ import annotations

import importlib.util

from mhmoe_np.errors import UserError


def check_installed(library: str, *, extra: str, needed_by: str, otherwise: str = "") -> None:
    """Make sure that a library is there before the work that needs it.

    needed_by: the option, setting or file. otherwise: what helps beside the installation.

    Raises UserError: it is missing; the line says how to install it.
    """
    if importlib.util.find_spec(library) is None:
        raise missing(library, extra=extra, needed_by=needed_by, otherwise=otherwise)


def missing(library: str, *, extra: str, needed_by: str, otherwise: str = "") -> UserError:
    """The error of a library that is not there; see `check_installed`."""
    return UserError(
        f"{needed_by}: needs {library}, which is not installed; install it with: "
        f"pip install 'mhmoe-np[{extra}]'{otherwise}"
    )
