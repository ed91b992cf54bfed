"""Whether there is memory enough, before it is asked for.

The system promises more than it has and ends the process that takes it at its word, without a line.
"""

from __future__ import annotations

import contextlib
import ctypes

from mhmoe_np.errors import UserError


def check_memory(needed: int, what: str, *, remedy: str) -> None:
    """Refuse what needs more bytes than are free; `needed` must not be more than it really takes.

    Raises UserError: "`what` need(s) so much and so much is free; `remedy`".
    """
    try:
        import psutil
    except ModuleNotFoundError:  # in a source tree alone: what is free is not known
        return
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{what} {size_text(needed)} of memory and {size_text(free)} are free; {remedy}"
        )


def return_free_memory() -> None:
    """Give the system back what this process has freed but still holds.

    glibc keeps the pages between pieces that are in use; after work on many small ones these are a
    hundred megabytes. Other systems' libraries have no such call, and nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def size_text(size: int) -> str:
    """So many bytes, in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
