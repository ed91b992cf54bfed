"""What the README promises of its commands, all of which tests/test_docs.py runs, and its Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.resume import digests

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_default_run_trains_scores_three_domains_and_prints_a_sample(
    mhmoe: Run, mhmoe_here: Run, tmp_path: Path
) -> None:
    printed = mhmoe("train", "--steps", 2).stdout
    assert "sample:" in printed
    scores = json.loads((tmp_path / "runs" / "quick" / "evaluation.json").read_text())["domains"]
    assert set(scores) == {"books", "lexicon", "speech"}
    assert all(score["bits_per_byte"] > 0 for score in scores.values())
    # A second run takes a folder of its own, and --resume auto finds the last one.
    mhmoe_here("train", "--steps", 2)
    assert (tmp_path / "runs" / "quick-2").is_dir()
    assert "runs/quick-2 is finished" in mhmoe_here("train", "--resume", "auto").stderr


def test_a_bitnet_model_is_trained_inspected_packed_run_and_unpacked(
    mhmoe_here: Run, tmp_path: Path
) -> None:
    mhmoe_here("train", "--preset", "quick-bitnet", "--steps", 2)
    assert "float32" in mhmoe_here("inspect", "runs/quick-bitnet").stdout
    mhmoe_here("pack", "runs/quick-bitnet", "--out", "packed")
    mhmoe_here("unpack", "packed", "--out", "floats")
    same = [
        mhmoe_here("generate", name, "--prompt", "Call me", "--max-new-tokens", 5).stdout
        for name in ("runs/quick-bitnet", "packed", "floats")
    ]
    assert same[0] == same[1] == same[2]
    held_out = tmp_path / "runs" / "quick-bitnet" / "validation" / "speech.jsonl"
    scores = {
        mhmoe_here("eval", name, "--domain", f"s={held_out}", "--json").stdout
        for name in ("runs/quick-bitnet", "packed", "floats")
    }
    assert len(scores) == 1


def test_its_python_does_what_the_commands_do(
    mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line]
    assert sum(not line.startswith(("import ", "from ")) for line in lines) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.sub(r'"steps": (\d)0', r'"steps": \1', block[1]), names)  # 2 and 3, not 20 and 30

    mhmoe_here("train", "--steps", 2, "--out", "runs/by-command")
    mhmoe_here("train", "--resume", "runs/by-command", "--steps", 3)
    ours, commands = tmp_path / "runs" / "from-python", tmp_path / "runs" / "by-command"
    assert digests(ours) == digests(commands)
    for name in ("evaluation.json", "config.toml", "environment.json"):
        assert (ours / name).read_bytes() == (commands / name).read_bytes()
    assert names["trainer"].step == 3
    assert names["score"] == names["result"].scores["speech"]
    gradients = {name for name in names["tensors"] if name.startswith("grad.")}
    assert gradients == {f"grad.{name}" for name in names["trainer"].learner.parameters.tensors}


@pytest.mark.parametrize("heads", [2, 4])
def test_parity_solves(mhmoe_here: Run, heads: int) -> None:
    assert "experts E" in mhmoe_here("parity", "--heads", heads, "--top-k", 2).stdout
