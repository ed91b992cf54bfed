"""Completion in bash of words with an "=" in them.

Bash cuts such a word in three, `key`, `=` and `value`, and what completes the value takes the place of
that part alone. The other shells leave it whole.
"""

from __future__ import annotations

from typing import Any

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

APPENDED = "COMPREPLY+=($value)"


class WholeWords(BashComplete):
    """Joins what bash has cut, and answers with the part that it asked for."""

    # Behind "key=" the word goes on: no blank.
    source_template = BashComplete.source_template.replace(
        APPENDED, f"{APPENDED}; [[ $value == *= ]] && compopt -o nospace"
    )
    _kept = ""  # what stands before the part that is asked for

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one that is asked for, and that one."""
        cut, incomplete = super().get_completion_args()
        if incomplete == "=":
            cut, incomplete = [*cut, "="], ""
            goes_on = True
        else:
            goes_on = bool(incomplete) and cut[-1:] == ["="]
        words: list[str] = []
        for i, word in enumerate(cut):
            if words and "=" in (word, cut[i - 1]):
                words[-1] += word
            else:
                words.append(word)
        if goes_on and words:
            self._kept = words.pop()
        return words, self._kept + incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """As click does, of the part that is asked for."""
        return f"{item.type},{item.value.removeprefix(self._kept)}"


def complete_whole_words() -> None:
    """Let bash be answered so."""
    add_completion_class(WholeWords, "bash")
