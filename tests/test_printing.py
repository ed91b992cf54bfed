"""What reaches the terminal."""

from __future__ import annotations

import json

import pytest

from mhmoe_cli.printing import print_json, printable


def test_a_number_that_json_does_not_know_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": [float("nan"), 1.5, (float("inf"), 2)], "b": {"c": -float("inf"), "d": "NaN"}}
    print_json(value)
    assert json.loads(capsys.readouterr().out) == {
        "a": [None, 1.5, [None, 2]],
        "b": {"c": None, "d": "NaN"},
    }


def test_what_would_not_print_is_escaped() -> None:
    assert printable("plain ü [red]") == "plain ü [red]"
    assert printable("a\nb\x1b[31m\udcff\u2028\0") == r"a\nb\x1b[31m\udcff\u2028\x00"
