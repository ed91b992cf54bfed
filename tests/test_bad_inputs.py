"""Bad input ends in one line and code 2, and leaves everything as it was.

The first test runs cases drawn at random (`tests.bad_inputs`); the others are those that broke once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from mhmoe_np.errors import UserError
from mhmoe_np.model.parameters import parameter_table
from mhmoe_np.model.room import check_batch_room, check_room
from mhmoe_np.settings.model import MOST_TENSORS, ModelConfig, shown
from mhmoe_np.settings.presets import MODEL_PRESETS
from mhmoe_np.settings.run import COMMAND_LINE, Layer, resolve
from tests.bad_cases import LONG_NUMBER, MODEL, NUMPY, RUN, TEXT
from tests.bad_inputs import described, prepare, run_case, snapshot
from tests.conftest import Run
from tests.documents import read_documents

CASES, CHUNK = 24, 12
PROGRAM = [sys.executable, "-c", "from mhmoe_cli.main import main; main()"]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    prepare(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(MODEL))
    Path("config.toml").write_text(tomli_w.dumps(RUN))
    Path("text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def refused(folder: Path, mhmoe_here: Run) -> Refused:
    """Run the command line in this process: code 2 and one line, which is returned."""

    def run(*arguments: object) -> str:
        before = snapshot(folder)
        errors = mhmoe_here(*arguments, code=2).stderr
        assert errors.startswith("mhmoe-np: ")
        assert errors.count("\n") == 1
        assert snapshot(folder) == before
        return errors

    return run


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_bad_inputs_end_well(material: Path, first: int) -> None:
    endings = [run_case(number, 0, material) for number in range(first, first + CHUNK)]
    failures = [described(ending, 0) for ending in endings if ending.faults]
    assert not failures, "\n" + "\n".join(failures)


# ---- settings -------------------------------------------------------------------------------------

NESTED = "[" * 3000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f'{{"vocab_size": {LONG_NUMBER}}}', "config.json: cannot be read as JSON: holds an integer"),
        (f'{{"vocab_size": {NESTED}', "config.json: cannot be read as JSON: nested too deep"),
        (json.dumps(MODEL | {"vocab_size": 2**63}), "vocab_size: Input should be less than"),
        (json.dumps(MODEL | {"vocab_size": 10**400}), "(got an integer of 1329 bits)"),
        (json.dumps(MODEL | {"hidden_size": {"a": 1}}), "hidden_size: Input should be a valid integer"),
        (json.dumps(MODEL | {"x" * 900: 1}), "unknown key"),
        (
            json.dumps(MODEL | {"num_hidden_layers": 10**6}),
            "num_hidden_layers: 1000000 with num_experts 4",
        ),
        (json.dumps(MODEL | {"num_experts": 10**7}), "num_experts 10000000 make"),
        (json.dumps(MODEL | {"vocab_size": 2**31 - 1}), "config.json: the model's 34,359,7"),
        (json.dumps(MODEL | {"max_position_embeddings": 2**31 - 1}), "lower max_position_embeddings"),
        (
            json.dumps(MODEL | {"hidden_size": 18}),
            "hidden_size: 18 shared out over num_attention_heads 2",
        ),
        (json.dumps(MODEL | {"head_dim": 9}), "head_dim: 9 is odd"),
        (json.dumps([MODEL]), "must hold a JSON object"),
    ],
)
def test_a_model_config_is_refused(refused: Refused, content: str, words: str) -> None:
    Path("config.json").write_text(content)
    line = refused("init", "config.json", "--out", "made", "--seed", 0)
    assert words in line
    assert "config.json: " in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (f"steps={LONG_NUMBER}", "--set steps: cannot be read: holds an integer of too many digits"),
        (f"steps={NESTED}", "--set steps: cannot be read: nested too deep"),
        ("steps=0x" + "f" * 9000, "--steps or --set training.steps: Input should be less than"),
        (f"batch_size={10**30}", "--set training.batch_size: "),
        (f"seed={2**63}", "--set training.seed: "),
        ("sequence_length=0", "--set training.sequence_length: Input should be greater than 0"),
        ("sequence_length=64", "--set training.sequence_length: 64 is above"),
        ("num_attention_heads=16", "--set model.num_attention_heads: model.hidden_size: 16 shared out"),
        ("gradient_accumulation_steps=3", "--set training.gradient_accumulation_steps: 3 does not"),
        ('data.tokenizer="a\\u0000b"', "--set data.tokenizer: a path must not hold a zero byte"),
        ("data.tokenizer=", "--set data.tokenizer: a path must not be empty"),
        ("data.tokenizer=\udcff", "--set data.tokenizer: a path must be UTF-8"),
        ("vocab_size=2000000000", "make the model smaller"),
        ("max_position_embeddings=2000000000", "lower max_position_embeddings"),
        ("moe_capacity_factor=1e300", "--set model.moe_capacity_factor: "),
        ("rope_theta=1e-300", "--set model.rope_theta: "),
        ("learning_rate=nan", "--set optimizer.learning_rate: Input should be a finite number"),
        ("\n=1", "--set: unknown key"),
        ("", "--set '': must be key=value"),
    ],
)
def test_a_setting_is_refused_by_the_name_of_its_option(
    refused: Refused, setting: str, words: str
) -> None:
    line = refused("plan", "config.toml", "--set", setting)
    assert words in line
    assert len(line) < 400


def test_a_bad_key_is_put_down_to_the_place_that_set_it(refused: Refused) -> None:
    Path("config.toml").write_text(tomli_w.dumps({"training": {"sequence_length": 512}}))
    line = refused("plan", "config.toml", "--preset", "quick")
    assert "config.toml: training.sequence_length: 512 is above" in line
    Path("config.toml").write_text(tomli_w.dumps({"model": {"vocab_size": 300}}))
    assert "config.toml: missing key 'model.hidden_size'" in refused("plan", "config.toml")
    layers = [
        Layer({"model": {"moe_heads": 7}}, "a"),
        Layer({"model": {"hidden_size": 15}}, COMMAND_LINE),
    ]
    with pytest.raises(
        UserError, match=r"^--set model.hidden_size: model.moe_heads: 7 does not divide"
    ):
        resolve([Layer(RUN, "under"), *layers, Layer({"model": {"head_dim": 8}}, "over")])


def test_shown_values_are_short() -> None:
    values = [
        "x" * 999,
        [[["y" * 99] * 99] * 99],
        {"a": 1},
        10**9999,
        -(10**50),
        list(range(999)),
        "\n",
    ]
    for value in values:
        assert len(shown(value)) <= 64
        assert "\n" not in shown(value)


# ---- what a model needs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "moe_heads": 1},
        {"moe_projection_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 5},
        {"shared_expert_intermediate_size": 8, "quantization": "bitnet", "decoder_sparse_step": 1},
        {"use_sub_norm": True, "moe_head_layer": False, "decoder_sparse_step": 3},
    ],
)
def test_tensors_are_counted_without_a_table(over: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(MODEL | over)
    assert config.tensor_count == sum(len(entry.parts) for entry in parameter_table(config))
    assert config.moe_layers == sum(map(config.is_moe_layer, range(config.num_hidden_layers)))


def test_the_presets_are_far_from_the_limit_and_fit() -> None:
    for name, config in MODEL_PRESETS.items():
        assert 10 * config.tensor_count < MOST_TENSORS
        if name.startswith("small-"):
            check_room(config, copies=4, source=name)


@pytest.mark.parametrize(
    ("key", "copies"), [("vocab_size", 1), ("max_position_embeddings", 0), ("intermediate_size", 4)]
)
def test_a_model_beyond_memory_is_refused(key: str, copies: int) -> None:
    config = ModelConfig.model_validate(MODEL | {key: 2**31 - 1})
    with pytest.raises(UserError, match=r"^here: the model's .* GB are free; make the model smaller"):
        check_room(config, copies=copies, source="here")


def test_a_batch_beyond_memory_is_refused() -> None:
    config = ModelConfig.model_validate(MODEL)
    check_batch_room(config, tokens=4096, source="here")
    with pytest.raises(UserError, match=r"^here: the activations of 1,000,000,000,000 tokens"):
        check_batch_room(config, tokens=10**12, source="here")


# ---- files that are none --------------------------------------------------------------------------


def make_odd(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_what_is_no_file_is_refused(refused: Refused, material: Path, kind: str) -> None:
    shutil.copytree(material / "checkpoint", "checkpoint")
    words = "no such file" if kind == "missing" else f"is a {kind}"
    trace = ["trace", "checkpoint", "--out", "made.safetensors", *NUMPY, "--tokens"]
    for name, arguments in (
        ("config.json", ["init", "config.json", "--out", "made", "--seed", 0]),
        ("config.toml", ["plan", "config.toml"]),
        ("tokens.npy", [*trace, "tokens.npy"]),
        ("tokens.json", [*trace, "tokens.json"]),
    ):
        make_odd(Path(name), kind)
        assert f"{name}: {words}" in refused(*arguments)
    data = Path("data.txt")
    make_odd(data, kind)
    expected = "has no .txt, .jsonl or .parquet file" if kind == "folder" else words
    assert expected in refused("eval", "checkpoint", "--domain", "a=data.txt", *NUMPY)
    if kind != "missing":
        tokenizer = Path("checkpoint/tokenizer.json")
        make_odd(tokenizer, kind)
        refused("eval", "checkpoint", "--domain", "a=text.txt", *NUMPY)


def test_a_text_whose_tokens_no_disk_holds_is_not_read(refused: Refused, material: Path) -> None:
    with Path("large.txt").open("wb") as file:
        file.truncate(1 << 42)
    line = refused("eval", material / "checkpoint", "--domain", "a=large.txt", *NUMPY)
    assert "large.txt: the tokens of 4,398.0 GB of text need 1,099.5 GB of disk or more, and " in line
    assert "name a folder with room in TMPDIR, or give less text" in line


@pytest.mark.parametrize("line", [f'{{"n": {LONG_NUMBER}}}', "[" * 100_000])
def test_a_line_of_json_is_refused(refused: Refused, line: str) -> None:
    Path("bad.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    assert "bad.jsonl:2: is not JSON: " in refused("plan", "config.toml", "--data", "bad.jsonl")


def test_names_that_are_not_utf8(refused: Refused, folder: Path) -> None:
    name = os.fsdecode(b"a\xff.txt")
    Path(name).write_text(TEXT)
    assert read_documents(name).documents
    assert "a path must be UTF-8 to be kept" in refused("plan", "config.toml", "--data", name)
    assert r"b\udcff.toml: no such file" in refused("plan", os.fsdecode(b"b\xff.toml"))


# ---- token files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", f"[[1, {LONG_NUMBER}]]", "holds an integer of too many digits"),
        ("t.json", "[" * 100_000, "nested too deep"),
        ("t.json", f"[[1, {2**64 - 100}, 3]]", "beyond 64 bits"),
        ("t.json", "[[1, 2], [3]]", "two-dimensional"),
        ("t.json", "[[1, true]]", "two-dimensional"),
        ("t.json", "[]", "shape [0, 0]"),
        ("t.json", '{"a": 1}', "two-dimensional"),
        ("t.npy", np.array([[1, 2**64 - 100, 3]], np.uint64), "0 .. 299"),
        ("t.npy", np.array([[1.0, 2.0]]), "two-dimensional"),
        ("t.npy", "(1, 1000000000000)", "not a .npy or JSON array"),
        ("t.npy", "(10**9, 10**9)", "not a .npy or JSON array"),
        ("t.npy", "(-1, 5)", "not a .npy or JSON array"),
        ("t.npy", "[" * 900, "not a .npy or JSON array"),
    ],
)
def test_tokens_are_refused(
    refused: Refused, material: Path, name: str, content: Any, words: str
) -> None:
    path = Path(name)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif name == "t.npy":
        np.save(path, np.ones((1, 5), np.int64))
        path.write_bytes(path.read_bytes().replace(b"(1, 5)", content.encode()))
    else:
        path.write_text(content)
    line = refused("trace", material / "model", "--tokens", name, "--out", "made.safetensors", *NUMPY)
    assert f"{name}: " in line
    assert words in line


def test_a_trace_overwrites_nothing(refused: Refused) -> None:
    line = refused("trace", "none", "--tokens", "none.npy", "--out", "text.txt", *NUMPY)
    assert "text.txt: exists already; choose another --out" in line
    Path("link").symlink_to("nowhere")
    for command in (["trace", "none", "--tokens", "none"], ["init", "config.json", "--seed", 0]):
        assert "link: exists already" in refused(*command, "--out", "link")


# ---- numbers on the command line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "temperature: nan"),
        (["--temperature", "inf"], "temperature: inf"),
        (["--temperature", "-1"], "'--temperature'"),
        (["--top-p", "nan"], "top_p: nan"),
        (["--top-p", "inf"], "'--top-p'"),
        (["--seed", 10**40], "'--seed'"),
        (["--threads", 10**30], "--threads 1000000000000000000000000000000: this machine offers"),
        (["--prompt", "\udcff"], "--prompt: is not UTF-8"),
        (["--top-k", ""], "'--top-k'"),
    ],
)
def test_generating_refuses(refused: Refused, material: Path, arguments: Any, words: str) -> None:
    assert words in refused("generate", material / "checkpoint", "--prompt", "the", *NUMPY, *arguments)


@pytest.mark.parametrize("domain", ["", "a", "=x", "a=", "="])
def test_a_domain_without_a_name_or_a_path_is_refused(refused: Refused, domain: str) -> None:
    assert "must be NAME=PATH" in refused("eval", "none", "--domain", domain)


@pytest.mark.parametrize("number", [10**30, 2**31, 0, -1])
@pytest.mark.parametrize("option", ["--heads", "--top-k", "--hidden-size", "--baseline-experts"])
def test_parity_refuses(refused: Refused, option: str, number: int) -> None:
    line = refused("parity", "--heads", 3, "--top-k", 2, option, number)
    assert f"{option[2:].replace('-', '_')}: {number} is too " in line


# ---- models whose numbers are not finite, and what is printed ----------------------------------------


def test_what_is_not_finite_is_no_result(
    folder: Path, material: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mhmoe_np.checkpoints import checkpoint
    from mhmoe_np.model.weights import Weights

    load = checkpoint.load_mapped_weights

    def spoilt(*arguments: Any) -> Weights:
        weights = load(*arguments)
        weights.final_norm_D[...] = np.nan
        return weights

    monkeypatch.setattr(checkpoint, "load_mapped_weights", spoilt)
    found = material / "checkpoint"
    line = refused("eval", found, "--domain", "a=text.txt", "--json", *NUMPY)
    assert "domain a: its NLL is not finite (nan)" in line
    for temperature in (0, 1):
        line = refused("generate", found, "--prompt", "the", "--temperature", temperature, *NUMPY)
        assert "the logits are not finite" in line


def run(folder: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = os.environ | options.pop("environment", {})
    shell = options.pop("shell", "")
    return subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", *PROGRAM, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="latin-1",
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("name", ["[red]x[/]", "[/]", "a\nb", "\x1b[31m", "ü", "\udcff"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1:strict"])
def test_a_domain_is_shown_as_it_is_called(
    folder: Path, material: Path, name: str, encoding: str
) -> None:
    domain = f"{name}=text.txt"
    done = run(
        *(folder, "eval", material / "checkpoint", "--domain", domain, *NUMPY),
        environment={"PYTHONIOENCODING": encoding, "COLUMNS": "²"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.rstrip("\n").split("\n")
    assert len(lines) == 2
    if name.isascii() and name.isprintable():
        assert name in lines[1]
    assert "\x1b" not in lines[1]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["parity"], ["parity", "--json"], ["--help"], ["--version"]])
def test_output_that_cannot_be_written(folder: Path, arguments: list[str]) -> None:
    done = run(folder, *arguments, shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "mhmoe-np: a file or standard output: No space left on device; nothing was overwritten\n"
    )
    assert run(folder, *arguments, shell="2>/dev/full").returncode == 0
    assert run(folder, "trian", shell="2>/dev/full").returncode == 2
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        done = run(folder, *arguments, shell=closed)
        assert (done.returncode, done.stderr) == (0, "")
        assert run(folder, "trian", shell=closed).returncode == 2


@pytest.mark.parametrize("arguments", [["parity"], ["parity", "--json"], ["--help"]])
def test_a_closed_pipe_is_no_failure(folder: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, *arguments], cwd=folder, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# ---- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NUMBA_NUM_THREADS", "0", "NUMBA_NUM_THREADS=0: must be"),
        ("NUMBA_NUM_THREADS", "-1", "NUMBA_NUM_THREADS=-1: must be"),
        ("NUMBA_NUM_THREADS", "x", "NUMBA_NUM_THREADS=x: must be"),
        ("NUMBA_NUM_THREADS", "999999", "NUMBA_NUM_THREADS=999999: must be"),
        ("NUMBA_THREADING_LAYER", "bogus", "NUMBA_THREADING_LAYER=bogus: must be"),
        ("NUMBA_THREADING_LAYER_PRIORITY", "x", "unset NUMBA_THREADING_LAYER"),
        ("NUMBA_CPU_FEATURES", "bogus", "NUMBA_CPU_FEATURES=bogus: must be"),
        ("NUMBA_OPT", "x", "'NUMBA_OPT'"),
        ("MHMOE_NP_ISA", "x", "MHMOE_NP_ISA=x: this processor offers"),
        ("MHMOE_NP_BLAS", "x", "MHMOE_NP_BLAS=x: must be own, openblas or mkl; unset it"),
    ],
)
def test_a_variable_of_the_environment_is_refused(
    folder: Path, material: Path, variable: str, value: str, words: str
) -> None:
    arguments = ("eval", material / "checkpoint", "--domain", "a=text.txt")
    done = run(folder, *arguments, environment={variable: value})
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert run(folder, "eval", "--help", environment={variable: value}).returncode == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"COLUMNS": "x", "LINES": "²", "TMPDIR": "/nonexistent"},
        {"COLUMNS": "0", "TERM": "", "HOME": "/nonexistent", "XDG_CACHE_HOME": "/dev/null"},
        {
            "MHMOE_NP_ISA": "",
            "MHMOE_NP_BLAS": "",
            "NUMBA_THREADING_LAYER": "workqueue",
            "NUMBA_NUM_THREADS": "1",
        },
    ],
)
def test_odd_surroundings_do_not_matter(
    folder: Path, material: Path, variables: dict[str, str]
) -> None:
    arguments = ("eval", material / "checkpoint", "--domain", "a=text.txt")
    done = run(folder, *arguments, environment=variables)
    assert done.returncode == 0, done.stderr
