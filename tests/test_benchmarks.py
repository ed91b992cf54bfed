"""The benchmarks measure and print what they promise; how fast anything is, is for people to read."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, machines, packed, parts, products, questions, readme
from benchmarks.sizes import benchmark_config
from mhmoe_cli.run_settings import option_tables, resolved_config
from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.costs.model import macs_per_token, parameter_count
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.blas import blas_of
from mhmoe_np.operations.numba_cpu import NumbaOperations
from mhmoe_np.operations.numba_cpu.blas_libraries import openblas
from mhmoe_np.operations.numba_cpu.instruction_set import choose
from mhmoe_np.operations.packing import FORMATS
from mhmoe_np.operations.table import Operations

ROOT = Path(__file__).parents[1]
EXPERTS = {"384x768": 384 * 768, "256x512": 256 * 512}


def benchmark(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    return result


def test_packed_prints_a_row_for_every_case() -> None:
    options = ("--only", "experts", "--threads", "1", "--seconds", "0.01", "--json")
    rows = json.loads(benchmark("benchmarks.packed", *options).stdout)
    keys = {"case", "rows", "threads", "isa", "format", "ratio_to_sgemm", "gops", "blas"}
    assert all(set(row) == keys for row in rows)
    numpys = blas_of("numpy")
    assert {row["blas"] for row in rows} == {machines.described(numpys._asdict())}
    cases = [(row["case"], row["rows"], row["format"], row["isa"], row["threads"]) for row in rows]
    assert sorted(cases) == sorted(
        (f"experts {shape}", count, format, choose(), 1)
        for shape in EXPERTS
        for count in (1, 16, 256)
        for format in FORMATS
    )


def test_packed_counts_operations_and_compares_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def known_times(calls: dict[str, packed.Call], _seconds: float) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 3e-3 if name == "sgemm" else 2e-3 for name in calls}

    monkeypatch.setattr(packed, "fastest", known_times)
    backends = {choose(): NumbaOperations()}
    for row in packed.experts(backends, 1, 0.0):
        assert row["ratio_to_sgemm"] == 1.5
        multiply_adds = 16 * row["rows"] * 3 * EXPERTS[row["case"].removeprefix("experts ")]
        assert row["gops"] == pytest.approx(2 * multiply_adds / 2e-3 / 1e9, abs=0.05)


def test_decode_reports_both_sides_and_the_share_of_memorys_speed(tmp_path: Path) -> None:
    config = benchmark_config("A", "dense").model_copy(
        update={"num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True}
    )
    parameters = Parameters(config, np.float32)
    initialise(parameters, seed=0)
    (tmp_path / "tiny").mkdir()
    save_model(tmp_path / "tiny", parameters, None)
    options = ("--model", str(tmp_path / "tiny"), "--sequences", "2", "--prompt", "9", "--repeats", "1")
    options += ("--disturbed", "1", "--threads", "1", "--results", str(tmp_path), "--json")
    report = json.loads(benchmark("benchmarks.decode", *options).stdout)
    (written,) = tmp_path.glob("decode-tiny-transformers*-1.json")
    assert json.loads(written.read_text()) == report
    decoded, prefill = report["rows"]
    cached = 2 * 4 * 64  # numbers a position: keys and values of 4 heads of 64
    needed = 4 * (parameters.count + 2 * 16 * cached)
    assert decoded["mb_a_step"] == pytest.approx(needed / 1e6, abs=0.05)
    share = needed / (decoded["ours_ms"] * 1e-3) / (report["gb_per_s"] * 1e9)
    assert decoded["share_of_bandwidth"] == pytest.approx(share, rel=0.05, abs=1e-3)
    assert decoded["ours_tokens_per_s"] == pytest.approx(2e3 / decoded["ours_ms"], rel=0.01)
    for row in (decoded, prefill):
        ratio = row["ours_tokens_per_s"] / row["peer_tokens_per_s"]
        assert row["ratio"] == pytest.approx(ratio, rel=2e-3)


@pytest.mark.parametrize(
    ("work", "model"),
    [("train", "mhmoe"), ("evaluate", "mhmoe-bitnet")],
)
def test_a_comparison_reports_both_sides_and_draws_them(work: str, model: str, tmp_path: Path) -> None:
    options = ("--size", "A", "--model", model, "--peer", "torch", "--repeats", "1", "--json")
    options += ("--blas", "openblas")
    options += ("--batches", "1", "--results", str(tmp_path), "--disturbed", "1")
    row = json.loads(benchmark(f"benchmarks.{work}", *options).stdout)
    name = f"{work}-A-{model}-torch-{row['threads']}-threads"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}
    assert json.loads((tmp_path / f"{name}.json").read_text()) == row

    config = benchmark_config("A", model)
    operations = 2 * sum(macs_per_token(config, config.max_position_embeddings).values())
    passes = 3 if work == "train" else 1
    assert row["ratio"] == pytest.approx(row["ours_tokens_per_s"] / row["peer_tokens_per_s"], rel=2e-3)
    assert row["median_ratio"] == pytest.approx(row["ratio"], abs=1e-3)  # of a single turn
    for side, mfu in (("ours", "mfu"), ("peer", "peer_mfu")):
        reached = row[f"{side}_tokens_per_s"] * passes * operations / 1e9
        assert row[mfu] == pytest.approx(reached / row["sgemm_gflops"], rel=2e-3, abs=1e-3)
        assert row[mfu] > 0

    assert row["rss_ratio"] == pytest.approx(row["ours_peak_mb"] / row["peer_peak_mb"], abs=2e-3)
    arrays = 4 if work == "train" else 1  # parameters; gradient and two moments
    least = arrays * 4 * parameter_count(config).total / 1e6
    assert min(row["ours_peak_mb"], row["peer_peak_mb"]) > least

    nats = 10  # a loss of random weights is below: ln 8192 = 9.01
    assert 0 <= row["loss_difference"] <= compare.tolerance_of(model) * nats
    assert (row["rounds"], row["disturbed_rounds"]) == (1, 0)
    assert row["blas"] == blas_of("scipy")._asdict()
    assert row["peer_blas"]["name"] == "mkl"  # as PyTorch's wheels for this processor are built
    idle = {"feed-forward"} | ({"optimiser"} if work == "evaluate" else set())
    assert tuple(row["parts_ms"]) == parts.PARTS
    assert {part for part, spent in row["parts_ms"].items() if not spent > 0} == idle


@pytest.mark.parametrize("peers", [[9.0, 9.11], [9.1, 9.11], [float("nan"), 9.11], [9.0, float("nan")]])
def test_sides_that_disagree_give_no_report(peers: list[float]) -> None:
    compare.check_agreement([9.0, 9.1], [9.0001, 9.1001], tolerance=2e-5)
    with pytest.raises(SystemExit, match=r"the sides disagree on (nll|loss): .*; no report"):
        compare.check_agreement([9.0, 9.1], peers, tolerance=2e-5)


class Idle:
    """A side whose every step takes a second."""

    def ask(self, line: str) -> list[float]:
        return [float(line.split()[1])]


def turns(monkeypatch: pytest.MonkeyPatch, foreign: list[float]) -> None:
    """Every turn takes as many seconds as turns came before it, and others take these shares."""
    count = iter(range(10**6))

    def take_turn(*_: object) -> compare.Turn:
        number = next(count)
        return compare.Turn(float(number), foreign[number % len(foreign)])

    monkeypatch.setattr(compare, "take_turn", take_turn)


def test_a_disturbed_turn_is_dropped_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    turns(monkeypatch, [0.0, 0.0, 0.2, 0.0, 0.0, 0.06, 0.05, 0.0])
    sides = [Idle(), Idle()]
    kept, dropped = compare.interleave(sides, "train", 2, 2, 0.05)  # type: ignore[arg-type]
    assert kept == [[0.0, 6.0], [1.0, 7.0]]
    assert dropped == 2


def test_a_machine_that_is_never_quiet_gives_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    turns(monkeypatch, [0.0, 0.5])
    with pytest.raises(SystemExit, match="other processes disturb the measurement"):
        compare.interleave([Idle(), Idle()], "train", 2, 2, 0.05)  # type: ignore[list-item]


def test_the_stopwatch_knows_only_operations_of_the_table() -> None:
    assert set(parts.PART_OF_OPERATION) <= set(vars(Operations))
    assert set(parts.PART_OF_OPERATION.values()) <= set(parts.PARTS)


def test_the_page_is_made_of_the_results() -> None:
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page()


@pytest.mark.parametrize(
    ("machine", "folder"),
    [
        ("AMD EPYC (family 26 model 2, AVX-512, 2 cores)", "amd-epyc-family-26-model-2-avx512"),
        (
            "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz (family 6 model 143, AVX-512, 48 cores)",
            "intel-xeon-platinum-8488c-family-6-model-143-avx512",
        ),
        ("AMD EPYC 7B13 64-Core Processor (family 25 model 1, AVX2, 2 cores)",
         "amd-epyc-7b13-family-25-model-1-avx2"),
    ],
)  # fmt: skip
def test_a_machine_has_a_folder_whatever_its_cores(machine: str, folder: str) -> None:
    assert machines.folder_of(machine) == machines.RESULTS / folder


def test_results_lie_in_the_folder_of_the_machine_that_they_name() -> None:
    for path in machines.RESULTS.glob("*/*.json"):
        found = json.loads(path.read_text())
        named = [found] if "machine" in found else found.values() if isinstance(found, dict) else []
        for result in named:
            assert machines.folder_of(result["machine"]) == path.parent, path


def test_a_file_of_results_says_a_blas_that_is_not_openblas() -> None:
    assert [machines.tag({"name": name}) for name in ("openblas", "own", "mkl")] == ["", "-own", "-mkl"]


def test_products_has_a_row_for_each_shape_and_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def known_times(calls: dict[str, packed.Call], *_: object) -> dict[str, float]:
        return dict.fromkeys(calls, 1e-3)

    monkeypatch.setattr(products, "fastest", known_times)
    monkeypatch.setattr(products, "folder_of", lambda _: tmp_path / "machine")
    monkeypatch.setattr("sys.argv", ["products", "--json"])
    products.main()
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "machine" / "products.json").read_text()) == found
    assert [row["name"] for row in found["rows"]] == [shape.name for shape in products.SHAPES]
    for row in found["rows"]:
        operations = 2 * row["rows"] * row["outputs"] * row["inputs"]
        for name in found["libraries"]:
            assert row[name] == pytest.approx(operations / 1e-3 / 1e9, abs=0.05)


def test_a_product_that_is_wrong_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product", lambda *_: lambda: None)
    with pytest.raises(SystemExit, match="openblas does not compute A: expert, gate and up"):
        products.measure(products.SHAPES[0], [openblas()], 0.0)


def test_a_peer_of_another_architecture_is_refused() -> None:
    options = ("--peer", "hf-mixtral", "--model", "dense")
    assert "--model mixtral" in benchmark("benchmarks.train", *options, code=2).stderr


def test_each_change_of_the_questions_is_one_of_its_preset() -> None:
    for question in questions.QUESTIONS.values():
        for preset, change in itertools.product(question.presets, question.changes):
            plain, changed = (
                resolved_config(None, preset, option_tables(settings, (), steps=None)).model_dump()
                for settings in ((), (change,))
            )
            key = change.partition("=")[0]
            assert plain["model"].pop(key) != changed["model"].pop(key)
            assert plain == changed


def test_a_question_compares_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(_: questions.Runs, preset: str, change: str, seed: int) -> Path:
        run = tmp_path / f"{preset}{change}{seed}"
        run.mkdir()
        nll = math.log(100 + seed) + (math.log(1.05) if change else 0)
        # Domains count by their tokens: 3 and 1 make the mean.
        domains = {"a": {"nll": 3 * (nll - 1), "tokens": 3}, "b": {"nll": nll + 3, "tokens": 1}}
        (run / "evaluation.json").write_text(json.dumps({"domains": domains}))
        return run

    monkeypatch.setattr(questions.Runs, "trained", evaluated)
    row = questions.compare(questions.Runs(tmp_path, None, None), "small", "a=1", [0, 1])
    assert row["token_ppl"] == [100, 101]
    assert row["token_ppl_changed"] == [105, 106.05]
    assert row["percent_higher"] == [5, 5]
    assert row["mean_percent_higher"] == 5
