"""`mhmoe-np report`: what a page says is what the run's files say, and a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np import extras
from mhmoe_np.checkpoints.checkpoint import find_checkpoint, load_checkpoint_tokenizer, load_model
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import forward
from mhmoe_np.operations.load import load_operations
from mhmoe_np.report import run_page as run_page_module
from mhmoe_np.report.expert_tokens import LEAST, expert_tokens
from mhmoe_np.report.figures import (
    LEVEL_NAMES,
    POINTS,
    Curve,
    Group,
    HeatMap,
    LineChart,
    figures_of,
    level_of,
    smoothed,
    thinned,
    window_of,
)
from mhmoe_np.report.run_data import STEP, RouterLog, RunData, read_run
from mhmoe_np.report.run_page import Figures, Measure, number, read_runs, run_page
from mhmoe_np.report.svg import drawing
from mhmoe_np.settings.run import merge, parse_run_config, read_toml
from mhmoe_np.training.finish import finish_run
from mhmoe_np.training.run import resume_run, start_run
from mhmoe_np.training.run_folder import held_out_domains
from tests.audit.browser import chromium, opened
from tests.conftest import Run
from tests.documents import read_documents
from tests.resume import prepare

STEPS = 12
OTHER = "<i>ternary & more"  # a name that a page must escape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one MH-MoE, one BitNet, and what validation while training writes."""
    folder = tmp_path_factory.mktemp("report")
    for name, quantization in (("mine", "none"), (OTHER, "bitnet_b158")):
        prepare(folder, STEPS, quantization)
        changes = {
            "data": {"paths": [str(folder / "text.txt")]},
            "training": {"router_every": 3},
            "optimizer": {"learning_rate": 0.01},
        }
        tables = merge(read_toml(folder / "config.toml"), changes)
        config = parse_run_config(tables, source="test")
        trainer = start_run(folder / name, config, backend="numpy", threads=1)
        trainer.train()
        finish_run(trainer)
        trainer.close()
    lines = [{"step": step, "domains": {"text": {"token_ppl": 300.0 - step}}} for step in (4, 8, 12)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "mine" / "validation.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    ops = load_operations("numpy")
    return run_page(read_runs([folder / "mine"]), {"mine": expert_tokens(folder / "mine", ops=ops)})


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def charts_of(run: RunData) -> dict[str, Any]:
    return {figure.name: figure for group in figures_of(run) for figure in group.figures}


# ---- the numbers ----------------------------------------------------------------------------------


def test_curves_are_what_the_logs_say(folder: Path) -> None:
    lines = lines_of(folder / "mine" / "metrics.jsonl")
    charts = charts_of(read_run(folder / "mine"))
    each, mean = charts["loss"].curves
    assert each.x.tolist() == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in lines]
    assert each.y.tolist() == losses
    assert mean.y[-1] == pytest.approx(sum(losses[-10:]) / 10)
    for key in ("learning_rate", "tokens_per_s"):
        assert charts[key].curves[0].y.tolist() == [line[key] for line in lines]
    entropies = [line["router"][0]["entropy"] for line in lines]
    assert charts["router_entropy"].curves[0].y.tolist() == entropies
    validation = charts["validation"].curves[0]
    assert (validation.label, validation.y.tolist()) == ("text", [296.0, 292.0, 288.0])
    assert "router_dropped" not in charts  # without a capacity nothing can be


def test_heat_maps_are_what_the_routers_did(folder: Path) -> None:
    charts = charts_of(read_run(folder / "mine"))
    lines = lines_of(folder / "mine" / "router.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 12]
    loads = np.array([np.sum(line["layers"][0]["load"], axis=0) for line in lines], float)
    over_time = charts["load_layer_1"]
    assert over_time.ratio == pytest.approx((loads / loads.mean(axis=1, keepdims=True)).T)
    assert (over_time.first, over_time.last) == ("1", "12")
    for name, key in (("heads_choices_layer_1", "load"), ("heads_gates_layer_1", "gate_mass")):
        last = np.array(lines[-1]["layers"][0][key], float)
        assert charts[name].ratio == pytest.approx(last / last.mean(axis=1, keepdims=True))


def test_ternary_shares_and_flips_are_drawn(folder: Path) -> None:
    charts = charts_of(read_run(folder / OTHER))
    lines = lines_of(folder / OTHER / "metrics.jsonl")
    assert [curve.label for curve in charts["quantised_shares"].curves] == ["-1", "0", "+1"]
    for curve, key in zip(charts["quantised_shares"].curves, ("minus", "zero", "plus"), strict=True):
        assert curve.y.tolist() == [line["quantised"][key] for line in lines]
    flipped = charts["flipped"].curves[0].y.tolist()
    assert flipped == [line["quantised"]["flipped"] for line in lines]
    assert sum(flipped) > 0
    assert "flipped" not in charts_of(read_run(folder / "mine"))


def test_the_page_has_scores_settings_and_environment(folder: Path, page: str) -> None:
    evaluation = json.loads((folder / "mine" / "evaluation.json").read_text())["domains"]["text"]
    for key in ("token_ppl", "word_ppl", "byte_ppl", "bits_per_byte"):
        assert f">{number(evaluation[key])}<" in page
    environment = json.loads((folder / "mine" / "environment.json").read_text())
    for value in (environment["platform"], environment["packages"]["numpy"], "moe_intermediate_size"):
        assert value in page
    assert "Perplexity per token" in page
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', page) == ["data:,"]
    assert not re.search(r"<script|@import|url\(", page)


def test_a_comparison_says_how_far_runs_are_apart(folder: Path) -> None:
    assert Measure("", [2.0, 1.5, 2.5, None]).changes == [None, -0.25, 0.25, None]
    assert Measure("", [0.0, 1.0]).changes == [None, None]
    assert Measure("", [None, 1.0]).changes == [None, None]
    runs = read_runs([folder / "mine", folder / OTHER])
    text = run_page(runs, {})
    assert "<i>ternary" not in text
    assert html.escape(OTHER) in text
    rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th>\n?(.*?)</tr>', text, re.DOTALL))
    scores = [run.evaluation["text"]["token_ppl"] for run in runs.values()]
    row = rows["text: perplexity per token"]
    assert re.findall(r'"number">([^<]*)<', row) == [number(score) for score in scores]
    change = f"{scores[1] / scores[0] - 1:+.1%}".replace("-", "\N{MINUS SIGN}")
    assert re.findall(r"\((.*?)\)", row) == [change]
    assert "(same)" in rows["steps"]
    differing = rows["<code>model.quantization</code>"]
    assert re.findall("<code>(.*?)</code>", differing) == ["none", "bitnet_b158"]


def test_damaged_lines_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "mine", run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3], lines[5] = "not JSON\n", '{"step": "x"}\n'
    (run / "metrics.jsonl").write_text("".join(lines)[:-20])  # the last one is being written
    (run / "router.jsonl").unlink()
    data = read_run(run)
    assert data.metrics[STEP].tolist() == [1, 2, 3, 5, *range(7, STEPS)]
    assert data.notices == [f"{run / 'metrics.jsonl'}: 2 damaged lines are left out"]
    assert html.escape(data.notices[0]) in run_page({"run": data}, {})


def test_what_a_later_sitting_changed_is_said(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "mine", run)
    more = {"training": {"steps": STEPS + 1}, "optimizer": {"learning_rate": 0.02}}
    trainer = resume_run(run, more, backend="numpy", threads=1)
    trainer.train()
    trainer.close()
    data = read_run(run)
    assert (data.steps, data.config.training.steps) == (STEPS + 1, STEPS + 1)
    text = run_page({"run": data}, {})
    (said,) = re.findall(r"<p>(From step.*)</p>", text)
    key = "<code>optimizer.learning_rate</code>"
    assert said == f"From step {STEPS} on {key} is <code>0.02</code>; it was <code>0.01</code>."
    (run / "checkpoints" / f"step-{STEPS + 1:08d}" / "trainer_state.json").write_text("{")
    assert "trainer_state.json: cannot be read as JSON" in read_run(run).notices[0]


def test_a_run_without_a_step_has_a_page(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "mine", run)
    for name in ("metrics.jsonl", "router.jsonl", "validation.jsonl", "evaluation.json"):
        (run / name).unlink()
    text = run_page(read_runs([run]), {})
    assert f"0 of {STEPS} steps made" in text
    assert "Scored at the end" in text
    shutil.rmtree(run / "checkpoints")
    assert expert_tokens(run, ops=load_operations("numpy")) is None
    assert "There is no checkpoint yet" in run_page(read_runs([run]), {"run": None})


# ---- which tokens an expert takes -----------------------------------------------------------------


def test_tokens_of_experts_are_counted(folder: Path) -> None:
    """Against a count of its own, of every choice of every token, one by one."""
    run, ops = folder / "mine", load_operations("numpy")
    found = expert_tokens(run, ops=ops)
    assert found is not None
    checkpoint = find_checkpoint(run)
    model, tokenizer = (
        load_model(checkpoint, np.float32, ops=ops),
        load_checkpoint_tokenizer(checkpoint),
    )
    (file,) = held_out_domains(run).values()
    documents = read_documents(file).documents
    token_W = tokenise(documents, tokenizer)
    assert found.tokens == len(token_W)
    pairs = []
    for first in range(0, len(token_W), 32):
        window = token_W[first : first + 32]
        _, cache = forward(model, window[None].astype(np.int64), None, drop=False, ops=ops)
        moe = cache.blocks[1].feed_forward
        assert isinstance(moe, MoeCache)
        pairs += [
            (int(window[sub_token // 2]), int(expert))
            for sub_token, experts in enumerate(moe.routing.expert_MK)
            for expert in experts
        ]
    assert list(found.layers) == [1]
    for taken in found.layers[1]:
        here = [token for token, expert in pairs if expert == taken.expert]
        assert taken.share == pytest.approx(len(here) / len(pairs))
        expected = {}
        for token in set(here):
            count, seen = sum(token == other for other, _ in pairs), here.count(token)
            if seen > taken.share * count and count >= LEAST * 4:
                times = seen / (taken.share * count)
                expected[tokenizer.decode([token])] = (pytest.approx(times), seen)
        assert {token.token: (token.times, token.choices) for token in taken.tokens} == expected
        assert len(taken.examples) == min(2, len(taken.tokens))
        for token, example in zip(taken.tokens, taken.examples, strict=False):
            assert example.token == token.token
            assert example.before + example.token + example.after in documents[0]
    assert sum(taken.share for taken in found.layers[1]) == pytest.approx(1)


def test_no_more_tokens_are_looked_at_than_asked_for(folder: Path) -> None:
    found = expert_tokens(folder / "mine", tokens=70, ops=load_operations("numpy"))
    assert found is not None
    assert found.tokens == 70


# ---- drawing --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_smoothed_is_a_mean_of_the_last_values(values: list[float]) -> None:
    found = smoothed(np.array(values))
    assert found[0] == pytest.approx(values[0], abs=1e-6)
    window = window_of(len(values))
    assert found[-1] == pytest.approx(np.mean(values[-window:]), rel=1e-6, abs=1e-6)


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_thinned_curves_keep_their_ends_and_peaks(steps: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=steps)
    x, kept = thinned(np.arange(steps) + 1.0, y)
    assert len(x) <= POINTS + 2
    assert (x[0], x[-1]) == (1, steps)
    assert (kept.min(), kept.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()
    assert (y[x.astype(int) - 1] == kept).all()


def test_levels_of_load() -> None:
    ratios = np.array([0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 9.0])
    assert level_of(ratios).tolist() == list(range(len(LEVEL_NAMES)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_cell_of_a_heat_map_is_drawn_once_in_its_color(
    rows: int, columns: int, seed: int
) -> None:
    ratio = np.random.default_rng(seed).choice([0.0, 0.3, 1.0, 5.0], size=(rows, columns))
    text = drawing(HeatMap("name", "title", "expert", "step", ratio, "1", "9"))
    found = np.full((rows, columns), -1)
    for level, path in re.findall(r'<path class="k(\d)" d="([^"]*)"', text):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            cells = found[int(y), int(x) : int(x) + int(width)]
            assert (cells == -1).all()
            cells[:] = int(level)
    assert (found == level_of(ratio)).all()


def test_a_long_run_of_many_experts_makes_a_small_page(folder: Path) -> None:
    steps, rng = 100_000, np.random.default_rng(0)
    run, layers, lines = read_run(folder / "mine"), range(1, 24, 2), 400
    model = run.config.model.model_copy(update={"num_experts": 96, "moe_heads": 3})
    config = run.config.model_copy(update={"model": model})
    metrics = {key: rng.normal(size=steps) for key in run.metrics} | {STEP: np.arange(steps) + 1.0}
    balances = {layer: dict.fromkeys(run.balances[1], metrics[STEP]) for layer in layers}
    routers = {}
    for layer in layers:
        loads = list(rng.integers(0, 99, (lines, 3, 96)))
        columns = {key: rng.normal(size=lines) for key in run.routers[1].columns}
        routers[layer] = RouterLog(np.arange(lines), loads, loads, columns)
    long = RunData(run.folder, config, [], {}, metrics, balances, routers, {}, {}, [], [])
    assert len(run_page({"long": long}, {})) < 3_000_000


@pytest.mark.parametrize("values", [[0.0] * 3, [5.0] * 3, [-2.0], [1e-9, 2e-9], [3e12, -3e12], []])
def test_charts_of_any_numbers_have_finite_coordinates(values: list[float]) -> None:
    y = np.array(values)
    text = drawing(LineChart("name", "title", [Curve("label", np.arange(len(y)) + 1.0, y, 0)]))
    assert "nan" not in text
    assert "inf" not in text
    assert text.count('class="curve') == bool(values)


# ---- the command ----------------------------------------------------------------------------------


def test_the_command_writes_pages(mhmoe_here: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "mine", tmp_path / "mine")
    options = ("--backend", "numpy", "--tokens", "200")
    for _ in range(2):  # the second time it is written anew
        assert mhmoe_here("report", "mine", *options).stdout == "mine/report.html\n"
    assert "200 tokens of held-out text" in (tmp_path / "mine" / "report.html").read_text()
    printed = mhmoe_here("report", "mine", folder / OTHER, "--tokens", 0).stdout
    assert printed == "comparison.html\n"
    assert "Settings that differ" in (tmp_path / "comparison.html").read_text()


def test_the_command_writes_plots(
    mhmoe_here: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all figures, whose drawing takes long, one of each kind is drawn."""
    loss, load = (charts_of(read_run(folder / "mine"))[key] for key in ("loss", "load_layer_1"))
    few = Figures([loss], {"mine": [Group("few", "", [load])], OTHER: [Group("few", "", [loss])]})
    monkeypatch.setattr(run_page_module, "figures_of_runs", lambda _runs: few)
    options = ("--tokens", 0, "--plots", "plots", "--out", "new.html")
    printed = mhmoe_here("report", folder / "mine", folder / OTHER, *options).stdout
    assert printed == "new.html\nplots: 3 figures, each as PNG and SVG\n"
    stems = ("loss", "run-1-load_layer_1", "run-2-loss")
    names = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    for stem in stems:
        assert (tmp_path / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "plots" / f"{stem}.svg").read_text()
    assert "about 1: balanced" in (tmp_path / "plots" / "run-1-load_layer_1.svg").read_text()


def test_bad_input_is_one_line(
    mhmoe_here: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "mine"
    (tmp_path / "there").mkdir()
    (tmp_path / "comparison.html").write_text("mine")
    for arguments, says in (
        (("there",), "there: not a run folder (config.toml is missing)"),
        ((run, "--out", "there"), "there: exists already; choose another --out"),
        ((run, folder / OTHER), "comparison.html: exists already; choose another --out"),
        ((run, "--plots", "there"), "there: exists already; choose another --plots"),
        ((run, run, "--out", "new"), f"{run}: given twice; name each run once"),
    ):
        assert mhmoe_here("report", *arguments, code=2).stderr == f"mhmoe-np: {says}\n"
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda _name: None)
    said = mhmoe_here("report", run, "--plots", "new", code=2).stderr
    assert "needs matplotlib, which is not installed" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.html", "there"]
    assert (tmp_path / "comparison.html").read_text() == "mine"


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_errors_requests_or_overflow(
    folder: Path, page: str, tmp_path: Path
) -> None:
    files = {"one": page, "two": run_page(read_runs([folder / "mine", folder / OTHER]), {})}
    for name, text in files.items():
        file = tmp_path / f"{name}.html"
        file.write_text(text, encoding="utf-8")
        with opened(file.as_uri(), tmp_path) as shown:
            for _ in shown.views():
                # Nothing that is drawn is cut off.
                assert shown.evaluate(
                    "[...document.querySelectorAll('svg text')].every(text => {"
                    "const t = text.getBoundingClientRect();"
                    "const s = text.ownerSVGElement.getBoundingClientRect();"
                    "return t.left >= s.left - 1 && t.right <= s.right + 1})"
                )
            assert shown.evaluate("document.querySelectorAll('svg').length") > 10
            assert shown.requests == [file.as_uri()]
            assert shown.messages == []
