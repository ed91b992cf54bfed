"""The benchmarks run and print what they promise; how fast anything is, is for people to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mhmoe_np.packing import FORMATS

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
