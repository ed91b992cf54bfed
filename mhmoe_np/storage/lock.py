"""One writer for each folder, by a lock that ends with its process however that ends.

The lock is the system's own (`flock`) on the folder itself: no file of ours says that it is there, so a
crash cannot leave one behind, and it stays with the folder when that is renamed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

from mhmoe_np.errors import Taken


class Lock:
    """Held until `release`, or until nobody refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self._end = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        self._end()


def lock_folder(path: Path) -> Lock:
    """Lock a folder that exists.

    Where the file system has no locks, nobody is kept out.

    Raises Taken: another process, or another lock of this one, holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flock(descriptor)
        # Between opening and locking its owner may have renamed it: then it is no longer ours to take.
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise Taken(
            f"{path}: another process is writing there; wait until it ends or stop it "
            f"(`fuser -v {path}` shows it)"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor)


def _flock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise


def is_locked(path: Path) -> bool:
    """Whether somebody writes to this folder just now; one that is not there nobody does."""
    try:
        lock_folder(path).release()
    except Taken:
        return True
    except OSError:
        return False
    return False
