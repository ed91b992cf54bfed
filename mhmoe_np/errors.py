"""The one exception that means: the user's input is at fault, and this is the line that says so."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line naming the file, key or value, and the remedy.

    The command line prints it to standard error without a traceback and exits with code 2.
    """
