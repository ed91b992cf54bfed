"""The pages of the site and the README, and what they show: commands, settings, Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": ROOT / "README.md",
    **{path.name: path for path in sorted((ROOT / "docs").glob("*.md"))},
    **{path.name: path for path in sorted((ROOT / "mhmoe_np").glob("*.md"))},
}
"""Name -> file: what the site shows, and the README."""
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"(\.venv/bin/)?(mhmoe-np|python3?|pip|eval|source|git|mkdocs)\s|\.ci/run$|_MHMOE_NP_"
)


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, in order."""
    found = FENCED.findall(PAGES[page].read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def command_blocks(page: str) -> list[list[str]]:
    """The blocks with commands, a command a line, without the comments behind them.

    A block is one if it says so (`sh`), or if it says nothing and one of its lines begins as a command.
    """
    found = []
    for text in blocks(page, "", "sh"):
        lines = [line for line in text.splitlines() if line]
        if text in blocks(page, "sh") or any(PROGRAM.match(line) for line in lines):
            found.append([re.sub(r"\s+# .*", "", line) for line in lines])
    return found


def arguments_of(command: str) -> list[str] | None:
    """What follows `mhmoe-np`; None: it is a command of another program."""
    program, *arguments = shlex.split(command)
    return arguments if program == "mhmoe-np" else None
