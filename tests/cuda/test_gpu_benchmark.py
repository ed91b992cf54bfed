"""`benchmarks.gpu` itself: its code runs, its rows keep their promise, a failure costs one section."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_job, gpu_ours, gpu_report, sizes
from benchmarks.gpu import in_a_process, run_section
from benchmarks.gpu_job import Job, Row
from tests.cuda.backend import cuda_operations
from tests.cuda.emulator import has_gpu

ROOT = Path(__file__).parents[2]
TOY = sizes.Size(
    batch=1,
    backbone={
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 5,
        "vocab_size": 23,
        "intermediate_size": 12,
    },
    experts={
        "mhmoe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "moe_heads": 2,
        }
    },
    sparse_step=2,
)
FACTS = {"device": "Emulated GPU (80 GB)", "date": "2026-01-02"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """The smallest job there is, on the backend that tests have."""
    monkeypatch.setitem(sizes.GPU_SIZES, "toy", TOY)
    monkeypatch.setattr(gpu_job, "BATCHES", 1)
    monkeypatch.setattr(gpu_ours, "REPEATS", 1)
    return Job(
        seconds=0.0,
        operations=partial(cuda_operations, keep_buffers=True),
        torch_device="cpu",
        folder=tmp_path,
        decoded=3,
    )


def test_whole_models_agree_with_the_peer(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_peer = pytest.importorskip("benchmarks.gpu_peer", reason="the peer needs PyTorch")
    monkeypatch.setattr(gpu_ours, "VARIANTS", (("mhmoe", "tf32x3"), ("mhmoe-bitnet", "float32")))
    monkeypatch.setattr(gpu_peer, "VARIANTS", (("mhmoe", "float32"), ("mhmoe-bitnet", "float32")))
    ours = list(gpu_ours.whole_models(job, "toy", "ours"))
    peers = list(gpu_peer.whole_models(job, "toy", "torch"))
    works = ["train", "evaluate", "decode 1", "decode 16"]
    assert [row["work"] for row in ours] == [row["work"] for row in peers] == 2 * works
    assert all(row["tokens_per_s"] > 0 for row in ours + peers)
    assert ours[0]["times_floor"] > 1
    assert gpu_report.disagreements(ours + peers) == []
    for a, b in zip(ours, peers, strict=True):
        if a["work"] == "train":
            assert a["nll"] == pytest.approx(b["nll"], rel=2e-4)
    text = gpu_report.page({"facts": FACTS, "rows": ours + peers, "sections": {}}, None)
    assert len([line for line in text.splitlines() if line.startswith("| decode")]) == 6
    wrong = [row | {"nll": 9.0} if "nll" in row else row for row in peers]
    assert len(gpu_report.disagreements(ours + wrong)) == 1  # float32 of ours was not measured


def test_every_operation_of_a_step_is_timed_beside_its_floor(job: Job, tmp_path: Path) -> None:
    rows = list(gpu_ours.single_operations(job, "toy"))
    *operations, whole = rows
    assert {"linear", "expert_ffn_backward", "token_nll_and_gradient", "adamw_in_place"} <= {
        row["operation"] for row in operations
    }
    assert sum(row["calls"] for row in operations) == whole["calls"]
    assert whole["us"] == pytest.approx(sum(row["us"] * row["calls"] for row in operations))
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in operations)
    report = {"facts": FACTS, "rows": rows, "sections": {"a": {"seconds": 1.0, "error": "broke"}}}
    paths = {path.name: path for path in gpu_report.write(report, tmp_path)}
    stem = "gpu-emulated-gpu-80-gb-2026-01-02"
    assert {f"{stem}.json", f"{stem}.md"} <= paths.keys()
    assert json.loads(paths[f"{stem}.json"].read_text("utf-8")) == report
    text = paths[f"{stem}.md"].read_text("utf-8")
    assert "- a: broke" in text
    assert "| sum of a step |" in text


def test_packed_products_stand_beside_cublas(job: Job) -> None:
    matrices, rows = ((16, 32),), (1, 4)
    ours = list(gpu_ours.packed_products(job, matrices, rows))
    kinds = {"float32", "tf32", "ternary-2bit", "ternary-base3", "sign-1bit"}
    assert {row["kind"] for row in ours} == kinds
    assert len(ours) == len(kinds) * len(rows)
    assert all(row["us"] > 0 and row["tops"] > 0 for row in ours)


def test_cublas_is_measured_through_pytorch(job: Job) -> None:
    gpu_peer = pytest.importorskip("benchmarks.gpu_peer", reason="the peer needs PyTorch")
    found = list(gpu_peer.products(job, ((16, 32),), (1, 4)))
    assert [row["kind"] for row in found] == 2 * ["float32", "tf32", "float16", "int8"]
    assert gpu_report.page({"facts": FACTS, "rows": found, "sections": {}}, None).count("cublas") == 4


# ---- sections --------------------------------------------------------------------------------


def python(code: str, seconds: float = 60.0) -> gpu.Outcome:
    return in_a_process([sys.executable, "-c", code], seconds)


def test_rows_are_kept_whatever_becomes_of_a_section(capfd: pytest.CaptureFixture[str]) -> None:
    row = "print('ROW {\"us\": 1.5}', flush=True)\n"
    assert python(row).rows == [{"us": 1.5}]
    assert python(row).error is None
    failed = python(row + "raise SystemExit('out of memory')")
    assert (failed.rows, failed.error) == ([{"us": 1.5}], "out of memory")
    late = python(row + "import time; time.sleep(60)", seconds=2.0)
    assert (late.rows, late.error) == ([{"us": 1.5}], "ended after 2 s")
    assert "us 1.5" in capfd.readouterr().out


def test_a_section_prints_each_row_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(job: Job) -> Iterator[Row]:
        yield {"us": 1}
        raise ValueError("planted")

    monkeypatch.setitem(gpu.SECTIONS, "planted", gpu.Section(1, rows))
    said: list[str] = []
    with pytest.raises(ValueError, match="planted"):
        run_section("planted", Job(), emit=said.append)
    assert said == ['ROW {"section": "planted", "us": 1}']


def test_all_sections_are_reported_and_the_time_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def outcome(command: list[str], seconds: float) -> gpu.Outcome:
        name = command[command.index("--section") + 1]
        row: dict[str, Any] = {"section": name, "us": 1.0}
        return gpu.Outcome([row], 0.0, "broke" if name == "cublas" else None)

    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    monkeypatch.setattr(gpu, "in_a_process", outcome)
    assert not gpu.run_all(["packed", "cublas"], 1.0, 9.5, tmp_path)
    report = json.loads((tmp_path / "gpu-emulated-gpu-80-gb-2026-01-02.json").read_text("utf-8"))
    assert [row["section"] for row in report["rows"]] == ["packed", "cublas"]
    assert report["sections"]["packed"]["error"] is None
    assert report["sections"]["cublas"]["error"] == "broke"
    assert not gpu.run_all(["packed"], 1.0, 0.0, tmp_path)  # no time at all


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("benchmarks.gpu: ")
    assert result.stderr.count("\n") == 1
