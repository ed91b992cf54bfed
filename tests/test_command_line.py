"""The door itself: help, presets, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_cli import main
from mhmoe_cli.main import COMMANDS
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS, RUN_PRESETS, described
from mhmoe_np.settings.run import parse_run_config
from tests.conftest import Run

PROGRAM = [sys.executable, "-c", "from mhmoe_cli.main import main; main()"]


def test_with_nothing_to_do_it_prints_its_help(mhmoe_here: Run) -> None:
    printed = mhmoe_here().stdout
    assert printed == mhmoe_here("--help").stdout
    lines = printed.splitlines()
    assert len(lines) > len(COMMANDS)
    for name in COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines)


def test_presets_lists_each_with_its_parameters(mhmoe_here: Run) -> None:
    rows = json.loads(mhmoe_here("presets", "--json").stdout)
    assert [row["name"] for row in rows] == list(RUN_PRESETS)
    by_name = {row["name"]: row for row in rows}
    for name in ("quick", "small-mh-moe-3-bitnet"):
        config = parse_run_config(RUN_PRESETS[name], source=name)
        assert by_name[name]["parameters"] == Parameters(config.model, "float32").count
        assert by_name[name]["steps"] == config.training.steps
    # 3 heads choose 3 experts each: of 96, 87 are idle in each of 2 layers; 3 matrices of 64 by 128.
    small = by_name["small-mh-moe-3"]
    assert small["parameters"] - small["active_parameters"] == 2 * 87 * 3 * 64 * 128


def test_presets_fit_a_terminal_of_80_columns(mhmoe_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = mhmoe_here("presets").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first_words = [line.split()[0] for line in lines[3:] if not line.startswith(" ")]
    assert first_words == list(RUN_PRESETS)
    (row,) = (line for line in lines if line.startswith("paper-mh-moe-3 "))

    assert row.split(maxsplit=3)[1:] == ["314.9", "109.7", row[44:]]
    assert row[44:].rstrip() == "MH-MoE, 3 heads, 96 experts, top 3"


def test_a_model_is_described_by_what_it_is() -> None:
    assert described(MODEL_PRESETS["paper-dense"]) == "dense"
    assert described(MODEL_PRESETS["paper-smoe"]) == "MoE, 8 experts, top 1"
    changes = {"shared_expert_intermediate_size": 8, "quantization": "bitnet"}
    config = ModelConfig.model_validate(MODEL_PRESETS["small-mh-moe-2"].model_dump() | changes)
    assert described(config) == "MH-MoE, 2 heads, 40 experts, top 2, shared expert, 1-bit"


# ---- completion, by click's protocol --------------------------------------------------------------


def asked(shell: str, *words: str) -> list[str]:
    """What a shell is told that the last of these words may become."""
    environment = os.environ | {
        "_MHMOE_NP_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["mhmoe-np", *words]),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    result = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_commands_are_completed() -> None:
    assert asked("bash", "pres") == ["plain,presets"]
    assert asked("bash", "tra") == ["plain,train", "plain,trace"]
    assert asked("zsh", "unp") == ["plain", "unpack", COMMANDS["unpack"]]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_presets_are_completed(command: str) -> None:
    found = asked("bash", command, "--preset", "paper-mh")
    assert found == [f"plain,{name}" for name in RUN_PRESETS if name.startswith("paper-mh")]
    assert len(found) == 4


def test_options_and_their_values_are_completed() -> None:
    assert asked("bash", "generate", "--rep") == ["plain,--repetition-penalty"]
    assert asked("bash", "pack", "--format", "ternary") == ["plain,ternary-2bit", "plain,ternary-base3"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_readme_says_how_a_shell_learns_it(shell: str) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"_MHMOE_NP_COMPLETE={shell}_source mhmoe-np" in readme
    environment = os.environ | {"_MHMOE_NP_COMPLETE": f"{shell}_source"}
    script = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"_MHMOE_NP_COMPLETE={shell}_complete" in script
    assert " mhmoe-np" in script


# ---- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["²", "0", "-3", "", "1e3", "9" * 30])
def test_a_size_of_the_terminal_that_is_none_is_forgotten(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", size)
    monkeypatch.setenv("LINES", "24")
    main._drop_odd_sizes()
    assert "COLUMNS" not in os.environ
    assert os.environ["LINES"] == "24"
