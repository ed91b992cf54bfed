"""The ledger of REFERENCES.md: for every equation, where it stands and which tests check it.

    python -m tests.house.ledger            print it
    python -m tests.house.ledger --write    write it into REFERENCES.md

It is read off three places, and `faults` says where they do not fit together:

- a docstring's section Source cites what the function follows: `[P1 eq. 2-4]`, `[spec 4 capacity]`;
- a comment beside a line that computes a numbered equation marks it: `# P1 eq. 3: y~ = ...`;
- a comment in a test says what the test checks: `# [P1 eq. 3]`.

What an operation's docstring in `operations/table.py` cites stands in its definition in `numpy_ref`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HEADING = "## The ledger\n"
NUMBERED = "eq.", "algorithm"
LOOSE = "Table", "section"  # a test may cite one that no function follows
TABLE, DEFINITIONS = "operations/table.py", "operations/numpy_ref"


class Citation(NamedTuple):
    """A source, and where in it: `eq. 3`, `algorithm 2`, `section 2.2`, `4 capacity`, or nothing."""

    tag: str
    where: str

    @property
    def is_numbered(self) -> bool:
        """Whether a line of code computes just this."""
        return self.where.startswith(NUMBERED)

    def __str__(self) -> str:
        return f"{self.tag} {self.where}".rstrip()


class Place(NamedTuple):
    """A function; of a whole module the name is empty."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}: {self.name}" if self.name else self.path


class Mark(NamedTuple):
    """A comment beside the line of an equation."""

    citation: Citation
    place: Place
    formula: str


class Row(NamedTuple):
    """One line of the ledger."""

    citation: Citation
    formula: str
    places: list[Place]
    tests: list[Place]


class _Unit(NamedTuple):
    """A module, class or function: its lines and its docstring."""

    name: str
    first: int
    last: int
    docstring: str


def units_of(text: str) -> list[_Unit]:
    """A module and all classes and functions in it, outer ones before inner ones."""

    def walk(node: ast.AST, prefix: str) -> Iterator[_Unit]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                name = prefix + child.name
                yield _Unit(name, first, child.end_lineno or first, ast.get_docstring(child) or "")
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    module = ast.parse(text)
    lines = len(text.splitlines())
    return [_Unit("", 0, lines, ast.get_docstring(module) or ""), *walk(module, "")]


def section(docstring: str, name: str) -> str | None:
    """A section of a docstring, on one line: from its name to the next line that is not indented."""
    found = re.search(rf"^{name} +(.*(?:\n +.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()) if found else None


def comments_of(text: str) -> list[tuple[int, str]]:
    """Line number and text of every comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.start[0], token.string.lstrip("# "))
        for token in tokens
        if token.type == tokenize.COMMENT
    ]


def _numbers(text: str) -> Iterator[int]:
    """`1-3, 12` -> 1, 2, 3, 12."""
    for part in text.split(", "):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def cited(content: str) -> list[Citation]:
    """What the text between two square brackets cites."""
    tag, _, where = content.partition(" ")
    for kind in NUMBERED:
        if where.startswith(f"{kind} "):
            numbers = _numbers(where.removeprefix(f"{kind} "))
            return [Citation(tag, f"{kind} {number}") for number in numbers]
    return [Citation(tag, where)]


class Ledger:
    """What a tree of the project's files says."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root, self._package = root, root / "mhmoe_np"
        self.page = (self._package / "REFERENCES.md").read_text(encoding="utf-8")
        self.tags = re.findall(r"^\| (\S+) \|", self.page.partition(HEADING)[0], re.MULTILINE)[1:]
        self.decisions = re.findall(r"^## (D\d+)\.", self._text("DECISIONS.md"), re.MULTILINE)
        _, *sections = re.split(r"^## (?=\d)", self._text("SPECIFICATION.md"), flags=re.MULTILINE)
        self._specification = {text.partition(".")[0]: text.lower() for text in sections}

    def _text(self, path: str) -> str:
        return (self._package / path).read_text(encoding="utf-8")

    @cached_property
    def modules(self) -> dict[str, str]:
        """Every module's text by its path in the package."""
        return {
            path.relative_to(self._package).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(self._package.rglob("*.py"))
        }

    @cached_property
    def _definitions(self) -> dict[str, str]:
        """For each function of `numpy_ref` its module."""
        return {
            unit.name: path
            for path, text in self.modules.items()
            if path.startswith(DEFINITIONS)
            for unit in units_of(text)
        }

    @cached_property
    def sources(self) -> dict[Place, list[str]]:
        """What stands in square brackets in each function's section Source."""
        found = {}
        for path, text in self.modules.items():
            for unit in units_of(text):
                source = section(unit.docstring, "Source")
                if source is not None:
                    found[self._place(path, unit.name)] = re.findall(r"\[([^]]+)\]", source)
        return found

    def _place(self, path: str, name: str) -> Place:
        operation = name.removeprefix("Operations.")
        if path == TABLE and operation in self._definitions:
            return Place(self._definitions[operation], operation)
        return Place(path, name)

    @cached_property
    def marks(self) -> list[Mark]:
        """All marks, in the order of the files."""
        found = []
        pattern = (
            rf"(?<!\[)\b({'|'.join(map(re.escape, self.tags))}) ({'|'.join(NUMBERED)}) (\d+(?:-\d+)?)"
        )
        for path, text in self.modules.items():
            units = units_of(text)
            for line, comment in comments_of(text):
                inner = [unit for unit in units if unit.first <= line <= unit.last][-1]
                formula = comment.partition(": ")[2]
                for tag, kind, numbers in re.findall(pattern, comment):
                    for number in _numbers(numbers):
                        citation = Citation(tag, f"{kind} {number}")
                        found.append(Mark(citation, Place(path, inner.name), formula))
        return found

    @cached_property
    def tests(self) -> dict[Citation, list[Place]]:
        """For each citation the tests whose comments have it."""
        found: dict[Citation, list[Place]] = defaultdict(list)
        for path in sorted((self._root / "tests").rglob("test_*.py")):
            text = path.read_text(encoding="utf-8")
            units = [unit for unit in units_of(text) if unit.name.startswith("test_")]
            for line, comment in comments_of(text):
                for content in re.findall(r"\[([^]]+)\]", comment):
                    if content.partition(" ")[0] not in (*self.tags, *self.decisions):
                        continue
                    for unit in units:
                        if unit.first <= line <= unit.last:
                            place = Place(path.relative_to(self._root / "tests").as_posix(), unit.name)
                            for citation in cited(content):
                                found[citation].append(place)
        return found

    @cached_property
    def rows(self) -> list[Row]:
        """The ledger, in the order of the sources."""
        places: dict[Citation, list[Place]] = defaultdict(list)
        for place, contents in self.sources.items():
            for content in contents:
                for citation in cited(content):
                    places[citation].append(place)
        formulas: dict[Citation, str] = {}
        for mark in self.marks:
            formulas[mark.citation] = formulas.get(mark.citation) or mark.formula
        return [
            Row(citation, formulas.get(citation, ""), places[citation], self.tests.get(citation, []))
            for citation in sorted(places, key=self._order)
        ]

    def _order(self, citation: Citation) -> tuple[int, int, int, str]:
        """By source, then by number; in the specification by section, then as they stand there."""
        known = [*self.tags, *self.decisions]
        first = known.index(citation.tag) if citation.tag in known else len(known)
        number = re.search(r"\d+", citation.where)
        within = 0
        if citation.tag == "spec":
            chapter, _, words = citation.where.partition(" ")
            within = self._specification.get(chapter, "").find(words.lower())
        return first, int(number[0]) if number else 0, within, citation.where

    # ---- what does not fit together --------------------------------------------------------

    def faults(self) -> list[str]:
        """Everything that makes the ledger untrue, a line each."""
        return [
            *self._unknown_sources(),
            *self._equations_without_their_source(),
            *self._unmarked_equations(),
            *self._untested_rows(),
        ]

    def _unknown_sources(self) -> Iterator[str]:
        for place, contents in self.sources.items():
            for content in contents:
                tag, _, where = content.partition(" ")
                if tag not in (*self.tags, *self.decisions):
                    yield f"{place}: [{content}] is no source of REFERENCES.md and no decision"
                if tag == "spec":
                    chapter, _, words = where.partition(" ")
                    if words.lower() not in self._specification.get(chapter, ""):
                        yield f"{place}: SPECIFICATION.md, section {chapter}, does not say {words!r}"
        for path, text in self.modules.items():
            for decision in re.findall(r"\[(D\d+)\]", text):
                if decision not in self.decisions:
                    yield f"{path}: [{decision}] has no heading in DECISIONS.md"

    def _equations_without_their_source(self) -> Iterator[str]:
        for path, text in self.modules.items():
            for word in re.findall(r"(\S+)\s+eq\. \d", text):
                if word.lstrip("[(") not in self.tags:
                    yield f"{path}: '{word} eq.' does not name a source of REFERENCES.md"

    def _unmarked_equations(self) -> Iterator[str]:
        marked = {(mark.citation, mark.place.path) for mark in self.marks}
        claimed = {(row.citation, place.path) for row in self.rows for place in row.places}
        for row in self.rows:
            for place in row.places:
                if row.citation.is_numbered and (row.citation, place.path) not in marked:
                    yield f"{place}: cites {row.citation}; no comment in that file marks its line"
        for mark in self.marks:
            if (mark.citation, mark.place.path) not in claimed:
                yield f"{mark.place}: marks {mark.citation}; no Source in that file cites it"

    def _untested_rows(self) -> Iterator[str]:
        known = {row.citation for row in self.rows}
        for row in self.rows:
            if row.citation.where and not row.tests:
                yield f"[{row.citation}]: no test has it in a comment ({row.places[0]})"
        for citation, places in self.tests.items():
            if citation.where and not citation.where.startswith(LOOSE) and citation not in known:
                yield f"{places[0]}: checks [{citation}], which no docstring's Source cites"

    # ---- the page ----------------------------------------------------------------------------

    def rewritten(self) -> str:
        """REFERENCES.md with the ledger that the code says."""
        written_by_hand = self.page.partition(HEADING)[0]
        equations, others = [], []
        for row in self.rows:
            where = f"{_listed(row.places)} | {_listed(row.tests)} |"
            if row.citation.is_numbered:
                equations.append(f"| {row.citation} | {_code(row.formula)} | {where}")
            else:
                others.append(f"| {row.citation} | {where}")
        lines = [
            "| equation | formula | in `mhmoe_np/` | checked in `tests/` |",
            "|---|---|---|---|",
            *equations,
            "",
            "What has no number: sections of the specification, with words to look for, and decisions.",
            "",
            "| source | in `mhmoe_np/` | checked in `tests/` |",
            "|---|---|---|",
            *others,
        ]
        return written_by_hand + HEADING + "\n" + "\n".join(lines) + "\n"


def _code(formula: str) -> str:
    return f"`{formula}`".replace("|", r"\|") if formula else ""


def _listed(places: list[Place]) -> str:
    """`a.py`: `f`, `g`; `b.py`: `h`."""
    parts = []
    for path, group in groupby(sorted(set(places)), key=lambda place: place.path):
        names = ", ".join(f"`{place.name}`" for place in group if place.name)
        parts.append(f"`{path}`: {names}" if names else f"`{path}`")
    return "; ".join(parts)


def main() -> None:
    """Print the page, or write it."""
    ledger = Ledger()
    if sys.argv[1:] == ["--write"]:
        (ROOT / "mhmoe_np" / "REFERENCES.md").write_text(ledger.rewritten(), encoding="utf-8")
    else:
        print(ledger.rewritten())
    for fault in ledger.faults():
        print(fault, file=sys.stderr)


if __name__ == "__main__":
    main()
