"""What a long step shows: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors import safe_open

from mhmoe_cli import progress as shown
from mhmoe_cli.printing import duration
from mhmoe_cli.progress import progress, tell
from mhmoe_np.audit.derivative import GradientCheck
from mhmoe_np.audit.models import settings
from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.data.tokenizer import train_tokenizer
from tests.conftest import Run
from tests.whole_models import parameters_of


@pytest.mark.parametrize(
    ("unit", "state", "line"),
    [
        # 1,000 took 11 s, so 9,000 take 99 s.
        ("tokens", (1000, 10_000, 100.0), "scoring: 1,000 of 10,000 tokens, 10%, 99 s left"),
        ("", (2, 3, 100.0), "scoring: 2 of 3, 67%, 6 s left"),
        ("tokens", (0, 10_000, 100.0), "scoring: 11 s so far"),
        ("tokens", (5, 0, 100.0), "scoring: 11 s so far"),
        ("bytes", (22_000_000, 1_022_000_000, 100.0), "scoring: 22 of 1,022 MB, 2.0 MB/s, 8 min left"),
    ],
)
def test_how_far_a_stage_is_makes_a_line(unit: str, state: Any, line: str) -> None:
    assert shown._State("scoring", *state).line(unit, 111.0) == line


def test_elsewhere_than_on_a_terminal_lines_are_told_also_while_nothing_calls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0.01)
    with progress("tokens") as show:
        show("scoring [red]a\n", 0, 0)
        time.sleep(0.2)
        show("packing", 1, 2)
        time.sleep(0.2)
    time.sleep(0.1)
    printed, said = capsys.readouterr()
    assert printed == ""
    first, *_, last = said.splitlines()
    assert first == "scoring [red]a\\n: 0 s so far"
    assert last == "packing: 1 of 2 tokens, 50%, 0 s left"


def test_a_short_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        show("packing", 1, 1)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(code: str, columns: int, *, with_output: bool = False) -> str:
    """What the code writes to a terminal of so many columns; with_output: standard output too."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    told = ("COLUMNS", "LINES", "NO_COLOR", "TERM")
    environment = {key: value for key, value in os.environ.items() if key not in told}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal,
        stdout=terminal if with_output else subprocess.DEVNULL,
        stderr=terminal,
        env=environment | {"TERM": "xterm"},
    )
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 4096):
            written += piece
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def test_on_a_terminal_a_bar_fills_its_width_and_what_is_told_stands_above_it() -> None:
    written = on_a_terminal(
        "import time; from mhmoe_cli import progress as module\n"
        "from mhmoe_cli.progress import progress, tell\n"
        "module.SECONDS_BEFORE_A_BAR = 0\n"
        "with progress() as show:\n"
        "    show('reading', 0, 0); time.sleep(0.3)\n"
        "    show('packing [red]', 1, 4); time.sleep(0.3)\n"
        "    tell('compiling [red] kernels, in a line longer than the terminal is wide ...')\n"
        "    with progress() as inner: inner('inside', 1, 2)\n"
        "    show('packing [red]', 4, 4)\n",
        60,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    bars = [line for line in re.split(r"[\r\n]+", plain) if line[1:].startswith(" packing [red] ")]
    assert any(" 25% 0 s so far" in line for line in bars)
    assert max(len(line) for line in bars) == 60
    # The bar's line is cleared first, and the line comes whole, as the terminal will fold it.
    told = "compiling [red] kernels, in a line longer than the terminal is wide ..."
    assert f"\r\x1b[2K{told}\r\n" in written
    assert "inside" not in plain
    assert written.endswith("\x1b[1A\x1b[2K")  # it leaves nothing


def test_what_is_told_amid_a_text_has_a_line_of_its_own() -> None:
    code = (
        "from mhmoe_cli.progress import print_part, tell\n"
        "tell('loading'); print_part('Call me'); tell('compiling'); tell('once')\n"
        "print_part(' now\\n'); tell('done')"
    )
    assert on_a_terminal(code, 60, with_output=True) == (
        "loading\r\nCall me\r\ncompiling\r\nonce\r\n now\r\ndone\r\n"
    )
    assert on_a_terminal(code, 60) == "loading\r\ncompiling\r\nonce\r\ndone\r\n"


def test_the_line_that_ends_a_command_has_one_of_its_own_too() -> None:
    code = (
        "from mhmoe_cli.main import _end\nfrom mhmoe_cli.progress import print_part\n"
        "print_part('Call me'); _end('stopped by SIGTERM', 0)"
    )
    assert on_a_terminal(code, 60, with_output=True) == "Call me\r\nmhmoe-np: stopped by SIGTERM\r\n"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (40, r". encoding a-domain-\w+… *  50% \d+ s left"),
        (60, r". encoding a-domain-with-a-long-name ━[━╸╺]+  50% \d+ s left"),
        (80, r". encoding a-domain-with-a-long-name ━[━╸╺]+  50% [\d.]+ MB/s, \d+ s left"),
    ],
)
def test_in_a_narrow_terminal_the_bar_gives_way_then_the_speed_and_the_name_last(
    columns: int, line: str
) -> None:
    written = on_a_terminal(
        "import time; from mhmoe_cli import progress as module\n"
        "module.SECONDS_BEFORE_A_BAR = 0\n"
        "with module.progress('bytes') as show:\n"
        "    for done in (1, 2, 4):\n"
        "        show('encoding a-domain-with-a-long-name', done, 8); time.sleep(0.25)\n",
        columns,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    lines = re.split(r"[\r\n]+", plain)
    assert any(re.fullmatch(line, each) and len(each) == columns for each in lines), lines
    assert max(map(len, lines)) <= columns


def test_work_that_ends_at_once_draws_nothing() -> None:
    code = "from mhmoe_cli.progress import progress\nwith progress() as show: show('packing', 1, 1)\n"
    assert on_a_terminal(code, 80) == ""


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_be_drawn_on_gets_lines(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert shown.may_show_bar()
    monkeypatch.setenv("TERM", kind)
    assert not shown.may_show_bar()


def test_with_no_bar_a_line_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell("[red]plain")
    assert capsys.readouterr() == ("", "[red]plain\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (58, "58 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7140, "119 min"),
        (11_100, "3 h 5 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# ---- the commands that take long -----------------------------------------------------------------


@pytest.fixture
def told(mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command tells of its progress: each stage, and how far it came, of how much."""
    tokenizer = train_tokenizer(["the whale and the sea"], vocab_size=270)
    for kind in ("dense", "mh2-ternary"):
        (tmp_path / kind).mkdir()
        save_model(tmp_path / kind, parameters_of(kind, vocab_size=270), tokenizer)

    def run(name: str, *arguments: object) -> dict[str, tuple[int, int]]:
        stages: dict[str, tuple[int, int]] = {}

        def show(stage: str, done: int, total: int) -> None:
            before, of = stages.get(stage, (0, total))
            # It comes again only when it was at its end; of how much may turn out later.
            assert before <= done or before == of
            assert of in (0, total)
            assert done <= total or not total
            stages[stage] = done, total

        @contextlib.contextmanager
        def recorded(unit: str = "") -> Iterator[Any]:
            yield show

        command = importlib.import_module(f"mhmoe_cli.{name}_command")
        monkeypatch.setattr(command, "progress", recorded)
        monkeypatch.setattr("mhmoe_cli.loading.progress", recorded)
        result = mhmoe_here(name, *arguments)
        assert result.stderr == "" or name in ("generate", "train")
        return stages

    return run


def read(folder: Path) -> dict[str, tuple[int, int]]:
    """What reading a checkpoint tells: each byte of its files is checked, then its tensors are read."""
    files = [path for path in folder.iterdir() if path.name != "checksums.json"]
    size = sum(path.stat().st_size for path in files)
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, framework="np") as file:
        filled = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return {f"checking {folder.name}": (size, size), f"reading {weights.name}": (filled, filled)}


def test_models_on_their_way_in_and_out_tell_how_far_they_are(told: Any, tmp_path: Path) -> None:
    backend = ("--backend", "numpy")
    dense = parameters_of("dense", vocab_size=270).count
    packable = parameters_of("mh2-ternary", vocab_size=270)
    ternary = packable.count
    quantised = sum(math.prod(entry.shape) for entry in packable.table if entry.quantised)
    assert told("export", "dense", "--format", "hf", "--out", "hf", *backend) == {
        **read(tmp_path / "dense"),
        "writing hf": (0, 0),
    }
    assert told("export", "dense", "--format", "gguf", "--out", "gguf", *backend) == {
        **read(tmp_path / "dense"),
        "exporting": (dense, dense),
    }
    for source, out in (("hf", "a"), ("gguf/model.gguf", "b")):
        assert told("import", source, "--out", out) == {
            "importing": (dense, dense),
            f"writing {out}": (0, 0),
        }
    assert told("pack", "mh2-ternary", "--out", "packed", *backend) == {
        **read(tmp_path / "mh2-ternary"),
        "quantising": (quantised, quantised),
        "packing": (ternary, ternary),
        "writing packed": (0, 0),
    }
    assert told("unpack", "packed", "--out", "floats", *backend) == {
        **read(tmp_path / "packed"),
        "unpacking": (ternary, ternary),
        "checking": (quantised, quantised),
        "writing floats": (0, 0),
    }
    experts = ("--experts", 2, "--top-k", 2, "--step", 1)
    assert told("upcycle", "dense", *experts, "--out", "experts") == {
        **read(tmp_path / "dense"),
        "drawing": (0, 0),
        "filling": (2, 2),
        "writing experts": (0, 0),
    }


def test_what_looks_at_models_tells_how_far_it_is(told: Any, tmp_path: Path) -> None:
    backend, dense = ("--backend", "numpy"), read(tmp_path / "dense")
    parameters = parameters_of("dense", vocab_size=270)
    (tmp_path / "config.json").write_text(parameters.config.model_dump_json())
    size = 4 * parameters.count
    assert told("init", "config.json", "--seed", 0, "--out", "drawn") == {
        "drawing weights": (size, size),
        "writing drawn": (0, 0),
    }
    assert told("inspect", "dense", *backend) == {**dense, "looking at the weights": (0, 0)}
    (tmp_path / "tokens.json").write_text("[[1, 2, 3, 4]]")
    trace = ("trace", "dense", "--tokens", "tokens.json", "--out", "t.safetensors", *backend)
    assert told(*trace) == {**dense, "computing": (0, 0), "writing t.safetensors": (0, 0)}
    layers = parameters.config.num_hidden_layers
    assert told("compare", "t.safetensors", "--checkpoint", "dense") == {
        "reading t.safetensors": (0, 0),
        **dense,
        "computing from its numbers": (0, 0),
        "looking for causes": (layers - 1, layers),
    }
    assert told("compare", "t.safetensors", "t.safetensors") == {
        "reading t.safetensors": (0, 0),
        "comparing": (0, 0),
    }
    prompt = ("--prompt", "the", "--max-new-tokens", 1, "--json")
    tokens = {"generating": (1, 1)}
    assert told("generate", "dense", *prompt, *backend) == {**dense, **tokens}


def test_a_run_that_goes_on_tells_how_far_its_files_are_read(told: Any, tmp_path: Path) -> None:
    tables = {
        "model": {**settings("mh2"), "vocab_size": 270},
        "training": {"batch_size": 2, "sequence_length": 8, "steps": 1},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tables))
    (tmp_path / "text.txt").write_text("the whale and the sea\n\n\n" * 40)
    told("prepare", "text.txt", "--vocab-size", 270, "--out", "store", "--workers", 1)
    options = ("--data", "store", "--out", "run", "--backend", "numpy")
    found = told("train", "config.toml", *options)
    assert f"checking {tmp_path}/store" not in found  # a store is named as it was given
    assert found["checking store"][0] == found["checking store"][1] > 0
    assert found["drawing weights"][0] == found["drawing weights"][1] > 0
    assert found["writing the report"] == (0, 0)
    found = told("train", "--resume", "run", "--steps", 2, "--backend", "numpy")
    for stage in ("checking run", "checking step-00000001", "checking store"):
        assert found[stage][0] == found[stage][1] > 0
    weights, moments = (found[f"reading {name}.safetensors"] for name in ("model", "optimizer"))
    assert moments == (2 * weights[0], 2 * weights[1])


def test_a_gradient_check_tells_how_far_it_is_where_its_lines_are_not_seen(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = GradientCheck("norm", 0.0, 1.0, None, None)
    monkeypatch.setattr("mhmoe_np.audit.gradcheck.check_all", lambda _ops: [check, check])
    for options in (("--json",), ()):
        assert told("gradcheck", "--backend", "numpy", *options) == {
            "numpy: checking gradients": (2, 0)
        }


def test_a_plan_tells_how_far_its_probes_are(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROBE_TOKENS", "BATCH_TOKENS"):
        monkeypatch.setattr(f"mhmoe_np.costs.plan.{name}", 64)
    tables = {
        "model": settings("mh2"),
        "training": {"batch_size": 32, "sequence_length": 8, "steps": 1},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tables))
    # 64 tokens and twice as many, in sequences of 8; each goes through the model three times.
    assert told("plan", "config.toml", "--backend", "numpy") == {
        "measuring the text": (0, 0),
        "probing this machine": (3 * (8 + 16), 3 * (8 + 16)),
    }


def test_packed_sizes_are_shown_in_a_unit_that_fits_them(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", parameters_of("mh2-ternary"), None, (0,))
    options = ("--out", "packed", "--backend", "numpy")
    printed = mhmoe_here("pack", "model", *options).stdout
    (tmp_path / "packed").rename(tmp_path / "other")
    sizes = json.loads(mhmoe_here("pack", "model", *options, "--json").stdout)["sizes"]
    row = next(line for line in printed.splitlines() if line.startswith("model "))
    assert f"{sizes['model']['packed_bytes'] / 1000:.2f} kB" in row
    assert f"{sizes['model']['float32_bytes'] / 1000:.2f} kB" in row
