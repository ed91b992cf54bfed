"""The pages in docs/ say what is there: their names, links and formulas hold, and their Python runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from latex2mathml.converter import convert

from mhmoe_cli.main import COMMANDS
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.table import Operations
from tests.house.ledger import ROOT, section, units_of

DOCS = ROOT / "docs"
PAGES = [path.name for path in sorted(DOCS.glob("*.md"))]
LINKED = ["derivations.md", "questions.md"]  # pages with formulas and links
PACKAGE = ROOT / "mhmoe_np"
LOCATED = re.compile(r"`([\w/]+\.py)`:\s+((?:`[\w.]+`(?:,\s+)?)+)")


class Page:
    """The page, taken apart."""

    def __init__(self, text: str) -> None:
        self.python = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        self.prose = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        self.sections = re.split(r"^## ", self.prose, flags=re.MULTILINE)[1:]
        displayed = r"^\$\$\n(.*?)\n\$\$$"
        inline = re.sub(displayed, "", self.prose, flags=re.MULTILINE | re.DOTALL)
        self.formulas = [
            *re.findall(displayed, self.prose, re.MULTILINE | re.DOTALL),
            *re.findall(r"\$(.+?)\$", inline),
        ]

    @property
    def located(self) -> list[tuple[str, str]]:
        """Every function that is named behind its file."""
        return [
            (path, name)
            for path, names in LOCATED.findall(self.prose)
            for name in re.findall(r"`([\w.]+)`", names)
        ]


@cache
def page(name: str = "derivations.md") -> Page:
    return Page((DOCS / name).read_text(encoding="utf-8"))


def file_of(path: str) -> Path:
    return ROOT / path if path.startswith("tests/") else PACKAGE / path


@cache
def functions_of(path: Path) -> frozenset[str]:
    """Functions, methods and classes, by their names with those around them."""
    return frozenset(unit.name for unit in units_of(path.read_text(encoding="utf-8")))


@cache
def words_of_the_package() -> frozenset[str]:
    """Every name in its code, of a function, argument, attribute or variable, and every string."""
    words: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words.update(str(getattr(node, field, "")) for field in ("name", "arg", "attr", "id"))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    return frozenset(words)


def misnamed(page: Page) -> Iterator[str]:
    """Files that are not there, functions that are not in their file, words that nothing is called."""
    for path, name in page.located:
        if not file_of(path).is_file():
            yield path
        elif name not in functions_of(file_of(path)):
            yield f"{path}: {name}"
    for path in re.findall(r"`([\w/]+\.py|[\w/]+/)`", page.prose):
        is_written = path.rstrip("/") in words_of_the_package()
        if not is_written and not (ROOT / path).exists() and not (PACKAGE / path).exists():
            yield path
    without_located = LOCATED.sub("", page.prose)
    for name in re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", without_located):
        known = words_of_the_package() | COMMANDS.keys()
        if not name.endswith(".py") and name not in known and not set(name.split(".")) <= known:
            yield name


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_function_that_a_page_names_exists(name: str) -> None:
    assert list(misnamed(page(name))) == []


def test_every_layer_and_every_operation_is_derived() -> None:
    assert len(page().located) > 100
    layers = {
        (f"layers/{path.name}", node.name)
        for path in (PACKAGE / "layers").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    definitions = {
        name: f"operations/numpy_ref/{path.name}"
        for path in (PACKAGE / "operations" / "numpy_ref").glob("*.py")
        for name in functions_of(path)
    }
    table = units_of((PACKAGE / "operations" / "table.py").read_text(encoding="utf-8"))
    operations = {
        unit.name.removeprefix("Operations.")
        for unit in table
        if unit.name.startswith("Operations.") and section(unit.docstring, "Cost")
    }
    assert {"linear_backward", "token_nll_and_gradient"} <= operations
    wanted = layers | {(definitions[name], name) for name in operations}
    assert wanted - set(page().located) == set()


def test_every_section_ends_with_its_code_and_its_tests() -> None:
    numbered = [text for text in page().sections if text[0].isdigit()]
    assert len(numbered) == 18
    for number, text in enumerate(numbered, start=1):
        assert text.startswith(f"{number} ")
        headings = re.findall(r"^\*\*([\w ]+)\.\*\*", text, re.MULTILINE)
        assert headings[-1] == "Tests", text.splitlines()[0]
        assert "Code" in headings
        last = text.rpartition("**Tests.**")[2]
        assert LOCATED.sub("", last).strip(" ;.\n") == "", last
        assert re.search(r"`test_\w+`", last)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    prose = page(name).prose
    links = re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (\S+)$", prose, re.MULTILINE)
    assert links or name not in LINKED
    for link in (inline or reference for inline, reference in links):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = DOCS / path if path else DOCS / name
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in map(slug, headings), link
    cited = set(re.findall(r"\[(D\d+)\](?!:)", prose))
    assert cited == set(re.findall(r"^\[(D\d+)\]: ", prose, re.MULTILINE))


@pytest.mark.parametrize("name", LINKED)
def test_every_formula_is_one_for_github(name: str) -> None:
    """There is nothing in it that Markdown takes for its own, or that LaTeX does not know."""
    assert page(name).formulas
    for formula in page(name).formulas:
        assert not re.search(r"[^A-Za-z0-9]_|\*|\\[^A-Za-z]|\\operatorname", formula), formula
        assert "\\" not in re.sub("&#x0*5C;", "\\\\", convert(formula)), formula


def run_after_the_first(block: str) -> None:
    """A block as a reader pastes it: after the first one, by itself."""
    names: dict[str, object] = {}
    for python in (page().python[0], block):
        exec(compile(python, "derivations.md", "exec"), names)


def test_the_python_of_the_page_runs() -> None:
    _, *blocks = page().python
    assert len(blocks) > 12
    for block in blocks:
        try:
            run_after_the_first(block)
        except Exception as error:
            error.add_note(block)
            raise


# ---- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("`layers/moe.py`: `moe_forward`, `moe_backwards`.", "layers/moe.py: moe_backwards"),
        ("`layers/more.py`: `moe_forward`.", "layers/more.py"),
        ("`tests/audit/test_trace.py`: `test_nothing`.", "tests/audit/test_trace.py: test_nothing"),
        ("It keeps `rstd_Q`.", "rstd_Q"),
    ],
)
def test_a_misnamed_one_is_found(sentence: str, fault: str) -> None:
    assert fault in misnamed(Page(sentence))


@pytest.mark.parametrize(
    "name", [name for name in vars(Operations) if name.endswith(("_backward", "_and_gradient"))]
)
def test_a_gradient_off_by_a_thousandth_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(numpy_ref, name)

    def wrong(first: Any, *others: Any, **options: Any) -> Any:
        return right(1.001 * first, *others, **options)

    monkeypatch.setattr(numpy_ref, name, wrong)
    blocks = [block for block in page().python if f"ops.{name}(" in block]
    assert blocks
    for block in blocks:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            run_after_the_first(block)
