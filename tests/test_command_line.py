"""The door itself: help, presets, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from click.shell_completion import get_completion_class

from mhmoe_cli import main
from mhmoe_cli.completion import complete_whole_words
from mhmoe_cli.main import COMMANDS
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS, RUN_PRESETS, described
from mhmoe_np.settings.run import KEYS, parse_run_config
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


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_presets_are_listed_one_a_line(
    columns: int, mhmoe_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    said, table = mhmoe_here("presets").stdout.split("\n\n")
    lines = table.splitlines()
    assert max(map(len, [*said.splitlines(), *lines])) <= columns
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(rows) == list(RUN_PRESETS)
    assert lines[0].split() == ["preset", "total", "active", "heads", "experts", "K"]
    assert rows["paper-mh-moe-3"] == ["314.9", "109.7", "3", "96", "3"]
    assert rows["small-dense"][2:] == ["-", "-", "-"]


def test_a_model_is_described_by_what_it_is() -> None:
    assert described(MODEL_PRESETS["paper-dense"]) == "dense"
    assert described(MODEL_PRESETS["paper-smoe"]) == "MoE, 8 experts, top 1"
    changes = {"shared_expert_intermediate_size": 8, "quantization": "bitnet"}
    config = ModelConfig.model_validate(MODEL_PRESETS["small-mh-moe-2"].model_dump() | changes)
    assert described(config) == "MH-MoE, 2 heads, 40 experts, top 2, shared expert, 1-bit"


# ---- completion, by click's protocol --------------------------------------------------------------


def asked(shell: str, *words: str) -> list[str]:
    """What a shell is told that the last of these words may become."""
    complete_whole_words()
    environment = {
        "COMP_WORDS": "\n".join(["mhmoe-np", *words]),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    kind = get_completion_class(shell)
    assert kind is not None
    with patch.dict(os.environ, environment):
        return kind(main.group, {}, "mhmoe-np", main.COMPLETION).complete().splitlines()


def test_commands_are_completed() -> None:
    assert asked("bash", "pres") == ["plain,presets"]
    assert asked("bash", "tra") == ["plain,train", "plain,trace"]
    assert asked("zsh", "unp") == ["plain", "unpack", COMMANDS["unpack"]]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_presets_are_completed(command: str) -> None:
    found = asked("bash", command, "--preset", "paper-mh")
    assert found == [f"plain,{name}" for name in RUN_PRESETS if name.startswith("paper-mh")]
    assert len(found) == 4


@pytest.mark.parametrize("command", ["train", "plan"])
def test_keys_of_settings_are_completed(command: str) -> None:
    assert asked("zsh", command, "--set", "model.num_ex")[1::3] == [
        "model.num_experts=",
        "model.num_experts_per_tok=",
    ]
    assert asked("bash", command, "--set", "learning") == ["plain,learning_rate="]
    # By a beginning that a table and a key share, both.
    found = asked("bash", command, "--set", "mo")
    assert "plain,model.vocab_size=" in found
    assert "plain,moe_heads=" in found
    every = asked("bash", command, "--set", "")
    assert every == [f"plain,{key}=" for key in KEYS]


def test_values_of_settings_that_are_words_are_completed() -> None:
    words = ["linear", "cosine", "two-stage", "constant"]
    for key in ("optimizer.schedule", "schedule"):
        found = asked("zsh", "train", "--set", f"{key}=")
        assert found[1::3] == [f"{key}={word}" for word in words]
        # Bash cuts the word, and asks for its last part alone.
        assert asked("bash", "train", "--set", key, "=") == [f"plain,{word}" for word in words]
        assert asked("bash", "train", "--set", key, "=", "co") == ["plain,cosine", "plain,constant"]
    assert asked("bash", "train", "--set", "tensorboard", "=", "t") == ["plain,true"]
    assert asked("bash", "train", "--set", "model.moe_heads", "=") == []
    assert asked("bash", "train", "--set", "no.such", "=") == []


def test_words_that_bash_cut_are_joined_before_the_one_asked_for_too() -> None:
    before = ("train", "--set", "training.steps", "=", "3", "--set", "ma", "=", "x")
    assert asked("bash", *before, "--tensor") == ["plain,--tensorboard"]
    assert asked("bash", "train", "--preset", "=", "small-den") == [
        "plain,small-dense",
        "plain,small-dense-bitnet",
    ]


def test_bash_puts_no_blank_behind_the_sign_of_equality(tmp_path: Path) -> None:
    program = tmp_path / "mhmoe-np"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM[-1]}" "$@"\n')
    program.chmod(0o755)
    # The function runs outside of a completion here, where compopt has nothing to change.
    script = (
        'compopt() { printf "%s " compopt "$@"; }\n'
        'eval "$(_MHMOE_NP_COMPLETE=bash_source mhmoe-np)"\n'
        'complete_of() { COMP_WORDS=(mhmoe-np train --set "$@"); COMP_CWORD=$((2 + $#)); COMPREPLY=()\n'
        '_mhmoe_np_completion mhmoe-np; echo "${COMPREPLY[@]}"; }\n'
        "complete_of optimizer.sch\ncomplete_of schedule = lin\n"
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert result.stdout == "compopt -o nospace optimizer.schedule=\nlinear\n"


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


def test_where_the_locale_is_not_utf_8_a_failure_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    arguments = [*PROGRAM, "report", "läuft"]
    result = subprocess.run(
        arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.endswith(
        "(this locale's encoding is ascii; for names beyond it set PYTHONUTF8=1)\n"
    )
    environment["PYTHONUTF8"] = "1"
    result = subprocess.run(
        arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stderr == "mhmoe-np: läuft: not a run folder (config.toml is missing)\n"


# ---- the start -------------------------------------------------------------------------------------


def test_what_numba_is_made_of_is_not_looked_at_for_garbage() -> None:
    code = (
        "import gc; from mhmoe_cli.backend import load; load('numba');"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True True\n"
