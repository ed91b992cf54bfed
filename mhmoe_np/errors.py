"""What a user did wrong, and what went wrong with a file: the exceptions that end in one line."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line naming the file, key or value, and the remedy.

    The command line prints it to standard error without a traceback and exits with code 2.
    """


class Damaged(UserError):
    """A file is not as it was written: missing, torn, changed, or with numbers that are not finite.

    Who has another copy of the same thing, an older checkpoint say, may turn to that.
    """


class Taken(UserError):
    """A name or a folder that another process has, or had first: another one may be free."""


class Interrupted(BaseException):
    """A signal ended the program: like KeyboardInterrupt, for any signal."""

    def __init__(self, kind: int) -> None:
        super().__init__(kind)
        self.signal = kind
