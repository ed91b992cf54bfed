"""Ending a text before a string, however its pieces come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.errors import UserError
from mhmoe_np.inference.stop_strings import StopStrings
from tests.operations.cases import quick

WORDS = st.text("ab.", max_size=20)


def shown(pieces: list[str], strings: list[str]) -> tuple[list[str], str, bool]:
    """What each piece lets through, what the end of the text does, and whether a string was found."""
    watch, through = StopStrings(strings), []
    for piece in pieces:
        through.append(watch.through(piece))
        if watch.found:
            break
    return through, watch.rest(), watch.found


def test_a_string_over_several_pieces_ends_the_text_and_nothing_of_it_is_shown() -> None:
    assert shown(["on", "e E", "N", "D two"], ["END"]) == (["on", "e ", "", ""], "", True)


def test_what_only_began_like_a_string_is_shown_once_that_is_known() -> None:
    assert shown(["a E", "N", "s", "E"], ["END"]) == (["a ", "", "ENs", ""], "E", False)
    # The held "aab" does not become "aabc", but it ends in what may begin one.
    assert shown(["aab", "aabc"], ["aabc"]) == (["", "aab"], "", True)


def test_the_first_string_to_be_complete_ends_the_text_and_of_two_the_longer() -> None:
    assert shown(["xabc"], ["b", "abc"]) == (["xa"], "", True)
    assert shown(["xabc"], ["c", "abc"]) == (["x"], "", True)


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop: an empty string"):
        StopStrings(["a", ""])


@given(
    pieces=st.lists(WORDS, max_size=8),
    strings=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
@quick(300)
def test_the_pieces_make_no_difference(pieces: list[str], strings: list[str]) -> None:
    text = "".join(pieces)
    # The shortest beginning of the text that ends in one of the strings, less the longest of them.
    expected, ended = text, False
    for end in range(len(text) + 1):
        found = [len(string) for string in strings if text[:end].endswith(string)]
        if found:
            expected, ended = text[: end - max(found)], True
            break
    through, rest, was_found = shown(pieces, strings)
    assert ("".join(through) + rest, was_found) == (expected, ended)
