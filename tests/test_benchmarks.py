"""The benchmarks run and print what they promise; how fast anything is, is for people to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_np.operations.packing import FORMATS

ROOT = Path(__file__).parents[1]


def test_packed_prints_a_list_of_rows() -> None:
    options = ("--only", "experts", "--threads", "1", "--seconds", "0.01", "--json")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.packed", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(result.stdout)
    keys = {"case", "rows", "threads", "isa", "format", "ratio_to_sgemm", "gops"}
    assert all(set(row) == keys for row in rows)
    assert all(row["ratio_to_sgemm"] > 0 and row["gops"] > 0 for row in rows)
    assert {row["format"] for row in rows} == set(FORMATS)
    assert {(row["case"], row["rows"]) for row in rows} == {
        (f"experts {shape}", count) for shape in ("384x768", "256x512") for count in (1, 16, 256)
    }


@pytest.mark.parametrize(
    ("work", "model"),
    [("train", "mhmoe"), ("train", "mhmoe-bitnet"), ("evaluate", "mhmoe-bitnet")],
)
def test_a_comparison_reports_both_sides_and_draws_them(work: str, model: str, tmp_path: Path) -> None:
    options = ("--size", "A", "--model", model, "--peer", "torch", "--repeats", "1", "--json")
    options += ("--results", str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{work}", *options, "--disturbed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    row = json.loads(result.stdout)
    name = f"{work}-A-{model}-torch-{row['threads']}-threads"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}
    assert row["ratio"] == pytest.approx(row["ours_tokens_per_s"] / row["peer_tokens_per_s"], abs=1e-2)
    assert row["mfu"] > 0
    assert row["rss_ratio"] > 0
    assert row["loss_difference"] < 2e-3
    assert sum(row["parts_ms"].values()) > 0


def test_a_peer_of_another_architecture_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", "--peer", "hf-mixtral", "--model", "dense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--model mixtral" in result.stderr
