"""`mhmoe-np audit`: every claim is there and names real lines, and a broken one is called broken."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mhmoe_cli import audit_command
from mhmoe_np.audit import gradcheck, operation_checks, peers
from mhmoe_np.audit.agreement import agreement, results_of
from mhmoe_np.audit.calls import calls
from mhmoe_np.audit.entries import PACKAGE, backward_of, layer_entries, operation_entries
from mhmoe_np.audit.peers import PEERS, ask
from mhmoe_np.operations import numpy_ref
from mhmoe_np.operations.door import promises
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.report import report as report_module
from tests.audit.browser import chromium, opened
from tests.conftest import Run

KIND = "smoe"


class _Wrong:
    """The definition, with the gradient of RMSNorm off by a thousandth."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy_ref, name)

    def rms_norm_backward(self, *arguments: Any, **options: Any) -> Any:
        return numpy_ref.rms_norm_backward(*arguments, **options) * 1.001


def few_checks(patch: pytest.MonkeyPatch) -> None:
    """One kind of model and four operations: the whole of it is `gradcheck`'s own test."""
    cases = operation_checks.cases

    def some(ops: Operations, rng: np.random.Generator) -> Iterator[operation_checks.Case]:
        wanted = "linear", "rms_norm", "rotate", "linear[bitnet_b158]"
        return (case for case in cases(ops, rng) if case.name in wanted)

    patch.setattr(gradcheck, "KINDS", [KIND])
    patch.setattr(operation_checks, "cases", some)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints, and its page: of the right backends, and of one that is wrong."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        few_checks(patch)
        run = CliRunner()
        right = run.invoke(audit_command.command, ["--json", "--html", str(folder / "right.html")])
        patch.setattr(report_module, "PEERS", ())
        patch.setattr(audit_command, "load_operations", lambda name: _Wrong())
        arguments = ["--backend", "numpy", "--html", str(folder / "wrong.html")]
        wrong = run.invoke(audit_command.command, arguments)
    return {"folder": folder, "right": right, "wrong": wrong}


@pytest.fixture(scope="module")
def report(made: dict[str, Any]) -> dict[str, Any]:
    assert made["right"].exit_code == 0, made["right"].output
    found: dict[str, Any] = json.loads(made["right"].stdout)
    return found


# ---- the right one --------------------------------------------------------------------------------


def test_every_claim_holds_and_has_its_bound(report: dict[str, Any]) -> None:
    assert report["passed"]
    subjects = [*report["operations"], *report["models"], *report["parity"]]
    claims = [claim for subject in subjects for claim in subject["claims"]]
    assert len(claims) == report["claims"] > 100
    assert report["failed"] == 0
    for claim in claims:
        assert claim["passed"]
        assert 0 <= claim["error"] <= claim["bound"] < 1e-5


def test_every_operation_is_there_with_all_that_is_said_of_it(report: dict[str, Any]) -> None:
    operations = {operation["name"]: operation for operation in report["operations"]}
    assert set(operations) == set(promises())
    for operation in operations.values():
        assert {"numpy", "numba", "cuda"} <= set(operation["places"])
        assert all(operation[key] for key in ("says", "equations", "shapes", "source", "cost"))


def test_every_operation_is_compared_in_both_float_types(report: dict[str, Any]) -> None:
    for operation in report["operations"]:
        compared = [claim for claim in operation["claims"] if claim["kind"] == "backend"]
        assert {(claim["by"], claim["dtype"]) for claim in compared} == {
            ("numba", "float32"),
            ("numba", "float64"),
        }


def test_peers_compute_every_operation_that_they_have(report: dict[str, Any]) -> None:
    """Both are installed where the tests run."""
    assert {title: state.partition(" ")[0] for title, state in report["peers"].items()} == {
        "PyTorch": "torch",
        "Hugging Face": "transformers",
    }
    by_torch = {
        operation["name"]
        for operation in report["operations"]
        for claim in operation["claims"]
        if claim["by"] == "PyTorch"
    }
    backwards = {name for name in promises() if name.endswith(("_backward", "_and_gradient"))}
    assert backwards <= by_torch
    by_hugging_face = [
        (operation["name"], claim["case"])
        for operation in report["operations"]
        for claim in operation["claims"]
        if claim["by"] == "Hugging Face"
    ]
    assert by_hugging_face == [
        *(("rms_norm", ""), ("rms_norm_backward", ""), ("rotate_in_place", "")),
        *(("attention", ""), ("attention_backward", ""), ("route", "normalised")),
        *(("expert_ffn", ""), ("expert_ffn_backward", "")),
    ]


def test_places_are_the_lines_of_definitions(report: dict[str, Any]) -> None:
    entries = [*report["operations"], *report["layers"]]
    assert len(report["layers"]) >= 15
    for entry in entries:
        for place in entry["places"].values():
            text = (PACKAGE.parent / place["path"]).read_text(encoding="utf-8")
            line = text.splitlines()[place["line"] - 1]
            assert re.match(rf" *def {entry['name']}\(", line), (entry["name"], place)


def test_places_of_a_backend_are_those_that_python_runs() -> None:
    for name in ("numpy", "numba"):
        ops = load_operations(name)  # type: ignore[arg-type]
        for operation, entry in operation_entries().items():
            code = getattr(ops, operation).__code__
            place = entry.places[name]
            assert (code.co_filename, code.co_firstlineno) == (
                str(PACKAGE.parent / place.path),
                place.line,
            )


def test_layers_are_those_of_the_files() -> None:
    found = {(entry.places["layers"].path, entry.name) for entry in layer_entries()}
    for file in ("attention", "feed_forward", "moe", "block"):
        path = f"mhmoe_np/layers/{file}.py"
        tree = ast.parse((PACKAGE.parent / path).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        public = {name for name in names if not name.startswith("_")}
        assert {(path, name) for name in public} <= found


def test_the_parity_table_is_the_papers(report: dict[str, Any]) -> None:
    # [spec 7 Paper configs]
    assert {row["macs_per_token"] for row in report["parity"]} == {4_718_592}
    assert [(row["heads"], row["experts"]) for row in report["parity"]] == [
        *((0, 0), (1, 8), (1, 16), (2, 40), (3, 96)),
    ]


def test_every_gradient_check_belongs_to_a_backward() -> None:
    cases = list(operation_checks.cases(numpy_ref, np.random.default_rng(0)))
    backwards = {name for name in promises() if name.endswith(("_backward", "_and_gradient"))}
    assert {backward_of(case.name) for case in cases} == {*backwards, "rotate_in_place"}


# ---- what is found --------------------------------------------------------------------------------


def test_a_broken_backward_is_said_to_be_broken(made: dict[str, Any]) -> None:
    assert made["wrong"].exit_code == 1
    lines = made["wrong"].stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED  ")]
    assert [line.partition(",")[0] for line in failed] == [
        "FAILED  rms_norm_backward",
        f"FAILED  {KIND}",
    ]
    assert " by differences, " in failed[0]
    assert "FAILED: 2 of " in lines[-1]


def test_the_page_says_so_in_words(made: dict[str, Any]) -> None:
    text = (made["folder"] / "wrong.html").read_text(encoding="utf-8")
    assert "FAILED: 2 of " in text
    assert "FAILED" not in (made["folder"] / "right.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("operation", ["linear", "quantise_rows", "dispatch", "adamw_in_place"])
def test_a_backend_that_differs_fails(operation: str) -> None:
    """In the last of its results, by one step of an integer or thousands of roundings."""

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy_ref, name)

    call = next(call for call in calls("float64", definition=numpy_ref) if call.operation == operation)
    wrong: Any = Wrong()
    expected = results_of(call, numpy_ref)
    assert agreement(call, results_of(call, wrong), expected, dtype="float64").same_bits
    for name, array in expected.items():
        if array.dtype == bool:
            continue
        off = array.copy()
        off.flat[-1] += 1 if array.dtype.kind in "iu" else 1e-12 * max(1, np.abs(array).max())
        found = agreement(call, expected | {name: off}, expected, dtype="float64")
        assert not found.passed
        assert found.array == name
    name = next(iter(expected))
    spoilt = expected[name].astype(float) * math.nan
    assert not agreement(call, {name: spoilt}, expected, dtype="float64").passed


def test_a_peer_that_is_absent_is_said_to_be() -> None:
    absent = PEERS[0]._replace(modules=("torch_that_is_not_there",))
    (answer,) = ask([absent], definition=numpy_ref)
    assert answer.state == "not compared: torch_that_is_not_there is not installed"
    assert answer.agreements == ()


def test_a_peer_that_cannot_compute_is_said_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "compute.py"
    script.write_text("raise ImportError('no such router')")
    monkeypatch.setattr(peers, "SCRIPT", script)
    (answer,) = ask(PEERS[:1], definition=numpy_ref)
    assert answer.state == "not compared: ImportError: no such router"
    assert answer.agreements == ()


def test_a_page_is_not_written_over(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    said = mhmoe_here("audit", "--html", "page.html", code=2).stderr
    assert said == "mhmoe-np: page.html: exists already; choose another --html\n"
    said = mhmoe_here("audit", "--html", "no/page.html", code=2).stderr
    assert said == "mhmoe-np: no/page.html: its folder does not exist; create it first\n"


# ---- the page -------------------------------------------------------------------------------------


def test_the_page_names_nothing_outside_itself(made: dict[str, Any]) -> None:
    text = (made["folder"] / "right.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', text) == ["data:,"]
    assert not re.search(r"<script|@import|url\(", text)


@pytest.mark.parametrize("name", ["right", "wrong"])
def test_the_pages_links_lead_to_one_place_each(made: dict[str, Any], name: str) -> None:
    text = (made["folder"] / f"{name}.html").read_text(encoding="utf-8")
    places = re.findall(r' id="([^"]*)"', text)
    assert len(places) == len(set(places))
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(places)
    if name == "wrong":
        assert re.findall(r'<li><a href="#([^"]*)"', text) == ["rms_norm_backward", f"model-{KIND}"]


def test_every_equation_is_rendered(made: dict[str, Any], report: dict[str, Any]) -> None:
    text = (made["folder"] / "right.html").read_text(encoding="utf-8")
    entries = [*report["operations"], *report["layers"]]
    formulas = sum(len(entry["equations"]) for entry in entries)
    assert text.count("<math ") == formulas > 60
    # What the converter does not know it leaves as it is.
    rendered = "".join(re.findall(r"<math .*?</math>", text, re.DOTALL))
    assert "\\" not in rendered
    # What is mended of it.
    assert '<mi mathvariant="normal">d</mi>' in rendered
    assert "&#x" not in rendered
    assert re.search(r"<mi>exp</mi><mspace [^>]*><m", rendered)
    assert not re.search(r"<mi>\N{PRIME}</mi></msu", rendered)


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_a_browser_shows_it_without_errors_requests_or_overflow(
    made: dict[str, Any], name: str, tmp_path: Path
) -> None:
    file = made["folder"] / f"{name}.html"
    with opened(file.as_uri(), tmp_path) as page:
        for _ in page.views():
            pass
        assert page.evaluate("document.querySelectorAll('math').length") > 60
        assert page.requests == [file.as_uri()]
        assert page.messages == []
