"""REFERENCES.md's ledger is what the code says, and the code cites, marks and tests every equation."""

from __future__ import annotations

import ast
import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest

from tests.house.ledger import HEADING, ROOT, Ledger

LEDGER = Ledger()


def test_the_page_is_what_the_code_says() -> None:
    assert LEDGER.page == LEDGER.rewritten(), "run python -m tests.house.ledger --write"


def test_sources_marks_and_tests_fit_together() -> None:
    assert LEDGER.faults() == []


def test_every_function_and_test_that_the_page_names_exists() -> None:
    """Read off the page itself, and looked up by importing."""
    rows = [line for line in LEDGER.page.partition(HEADING)[2].splitlines() if line.endswith(" |")]
    assert len(rows) > 50
    for row in rows:
        *_, code, tests = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        for path, names in named_in(code):
            module = importlib.import_module(f"mhmoe_np.{path.replace('/', '.')}")
            for name in names:
                assert callable(attrgetter(name)(module))
        for path, names in named_in(tests):
            text = (ROOT / "tests" / f"{path}.py").read_text(encoding="utf-8")
            defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
            assert set(names) <= defined


def named_in(cell: str) -> list[tuple[str, list[str]]]:
    """Module paths without `.py`, each with the names that follow it."""
    return [
        (path, re.findall(r"`([\w.]+)`", names))
        for path, names in re.findall(r"`([\w/]+)\.py`(?:: ([^;]*))?", cell)
    ]


# ---- what is found ------------------------------------------------------------------------------


PAGE = """# References

| tag | source |
|---|---|
| P1 | a paper |
| spec | `SPECIFICATION.md` |

## The ledger
"""
DECISIONS = "# Decisions\n\n## D1. One\n"
SPECIFICATION = "# The model\n\n## 1. Names\nnone\n\n## 2. Norms\nThe square root is taken.\n"
CODE = '''"""Norms."""

def norm(x):
    """The norm.

    Source   [P1 eq. 1-2], [spec 2 square
             root]; as decided [D1]
    """
    square = x * x  # P1 eq. 1: s = x^2
    # P1 eq. 2: n = sqrt(s)
    return square**0.5
'''
TEST = """
def test_norm():
    # [P1 eq. 1-2], [spec 2 square root]: a square's root.
    # [D1]: and so on.
    assert norm(2) == 2
"""


def planted(root: Path, *changes: tuple[str, str]) -> Ledger:
    """A small project; each change replaces a text that stands in one of its files."""
    files = {
        "mhmoe_np/REFERENCES.md": PAGE,
        "mhmoe_np/DECISIONS.md": DECISIONS,
        "mhmoe_np/SPECIFICATION.md": SPECIFICATION,
        "mhmoe_np/layers/norm.py": CODE,
        "tests/layers/test_norm.py": TEST,
    }
    for old, new in changes:
        assert sum(old in text for text in files.values()) == 1
        files = {path: text.replace(old, new) for path, text in files.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return Ledger(root)


def test_a_row_names_the_equation_its_formula_its_function_and_its_test(tmp_path: Path) -> None:
    ledger = planted(tmp_path)
    assert ledger.faults() == []
    where = "`layers/norm.py`: `norm` | `layers/test_norm.py`: `test_norm` |"
    page = ledger.rewritten()
    assert page.startswith(PAGE)
    rows = [line for line in page.removeprefix(PAGE).splitlines() if line.startswith("| ")]
    assert rows[1:3] == [f"| P1 eq. 1 | `s = x^2` | {where}", f"| P1 eq. 2 | `n = sqrt(s)` | {where}"]
    assert rows[4:] == [f"| spec 2 square root | {where}", f"| D1 | {where}"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "[P1 eq. 1-2], [spec 2 square\n",
            "[P3 eq. 1], [P1 eq. 1-2], [spec 2 square\n",
            "layers/norm.py: norm: [P3 eq. 1] is no source of REFERENCES.md and no decision",
        ),
        (
            "as decided [D1]",
            "as decided [D1], [D2]",
            "layers/norm.py: norm: [D2] is no source of REFERENCES.md and no decision",
        ),
        (
            "The square root",
            "The root",
            "layers/norm.py: norm: SPECIFICATION.md, section 2, does not say 'square root'",
        ),
        (
            "    # P1 eq. 2: n = sqrt(s)\n",
            "",
            "layers/norm.py: norm: cites P1 eq. 2; no comment in that file marks its line",
        ),
        (
            "[P1 eq. 1-2], [spec 2 square\n",
            "[P1 eq. 1], [spec 2 square\n",
            "layers/norm.py: norm: marks P1 eq. 2; no Source in that file cites it",
        ),
        (
            "# P1 eq. 2: n",
            "# P1 eq. 2; eq. 2: n",
            "layers/norm.py: '; eq.' does not name a source of REFERENCES.md",
        ),
        (
            "    # [P1 eq. 1-2], [spec 2 square root]: a square's root.\n",
            "    # [P1 eq. 1], [spec 2 square root]: a square's root.\n",
            "[P1 eq. 2]: no test has it in a comment (layers/norm.py: norm)",
        ),
        (
            "def test_norm():",
            "def norm_of_two():",
            "[P1 eq. 1]: no test has it in a comment (layers/norm.py: norm)",
        ),
        (
            "[P1 eq. 1-2], [spec 2 square root]: ",
            "[P1 eq. 1-3], [spec 2 square root]: ",
            "layers/test_norm.py: test_norm: checks [P1 eq. 3], which no docstring's Source cites",
        ),
    ],
)
def test_what_does_not_fit_is_found(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert fault in planted(tmp_path, (old, new)).faults()


def test_a_renamed_function_makes_another_page(tmp_path: Path) -> None:
    before = planted(tmp_path).rewritten()
    assert planted(tmp_path, ("def norm(x)", "def length(x)")).rewritten() != before
