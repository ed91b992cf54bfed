"""Bad inputs by category: each function fills a fresh folder and says what to run in it.

A case's codes are {2} where the input is surely bad. Where a random change may be harmless, 0 is
allowed too, and 1 where it may make a training run diverge.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import tomli_w

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_heads": 2,
}
TRAINING = {"steps": 1, "batch_size": 2, "sequence_length": 8}
RUN: dict[str, Any] = {"model": MODEL, "training": TRAINING}
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the whale\n\n\n" * 12
NUMPY = ["--backend", "numpy"]
BAD, PERHAPS, TRAINED = frozenset({2}), frozenset({0, 2}), frozenset({0, 1, 2})


class Case(NamedTuple):
    """What to run in the folder."""

    arguments: list[str]
    codes: frozenset[int]
    environment: dict[str, str] = {}  # noqa: RUF012  # nobody changes it


Maker = Callable[[Random, Path, Path], Case]

LONG_NUMBER = "9" * 4301


def any_value(rng: Random) -> Any:
    """A value that some key will not like. No number of middling size: it would take long, not fail."""
    return rng.choice(
        [
            *(-1, 0, 1, 3, -(2**63), 2**31 - 1, 2**31, 2**63, 10**30, 10**400),
            *(0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), 10**9),
            *("", "x", "a\0b", "\ud800", "7", "x" * 5000, "\n\x1b[31m", "[red]"),
            *(True, False, None, [], {}, [1], {"a": 1}, [[[[]]]], ["x" * 100] * 50),
        ]
    )


def without_none(value: Any) -> Any:
    """TOML has neither null nor lone surrogates, and integers of 64 bits as its writer sees them."""
    if value is None or value == "\ud800":
        return "none"
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return value


def damaged(rng: Random, content: bytes) -> tuple[bytes, frozenset[int]]:
    """Bytes that are no longer the text they were, and whether that must be noticed."""
    how = rng.randrange(6)
    whole = len(content.rstrip())
    if how == 0:
        return content[: rng.randrange(whole)], PERHAPS  # a TOML file may end anywhere
    if how == 1:
        return rng.randbytes(rng.randrange(1, 300)), BAD
    place = rng.randrange(whole)
    if how == 2:
        return content[:place] + rng.randbytes(1) + content[place + 1 :], PERHAPS
    if how == 3:
        return content[:place] + b"[" * rng.choice([1, 2000, 200_000]) + content[place:], PERHAPS
    if how == 4:
        return content[:place] + rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80"]) + content[
            place:
        ], BAD
    return content[:place] + LONG_NUMBER.encode() + content[place:], PERHAPS


def odd_place(rng: Random, path: Path) -> None:
    """Something else than a readable file stands at `path`, or nothing."""
    how = rng.randrange(7)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    elif how == 3:
        path.symlink_to(path.name)
    elif how == 4:
        path.symlink_to("nowhere")
    elif how == 5:
        path.touch()


def configs(rng: Random, folder: Path, material: Path) -> Case:
    """A model's JSON for `init`, a run's TOML for `train`; sometimes for `plan`."""
    is_json = rng.random() < 0.5
    path = folder / ("config.json" if is_json else "config.toml")
    (folder / "text.txt").write_text(TEXT)
    if is_json:
        arguments = ["init", path.name, "--out", "made", "--seed", "0"]
    else:
        arguments = ["train", path.name, "--data", "text.txt", "--out", "made", *NUMPY]
    tables: dict[str, Any] = json.loads(json.dumps(MODEL if is_json else RUN))
    codes = PERHAPS if is_json else TRAINED
    how = rng.randrange(5)
    if how == 0:
        odd_place(rng, path)
        return Case(arguments, BAD)
    if how == 1:
        content = (json.dumps(tables) if is_json else tomli_w.dumps(tables)).encode()
        content, noticed = damaged(rng, content)
        path.write_bytes(content)
        return Case(arguments, BAD if noticed == BAD else codes)
    table = tables if is_json else rng.choice([*tables.values(), tables.setdefault("optimizer", {})])
    if how == 2:
        table[rng.choice(["unknown", "hidden_siz", "", "a.b", "\x1b", "ß" * 300])] = any_value(rng)
        codes = BAD
    elif how == 3:
        table = table or tables["training"]
        del table[rng.choice(sorted(table))]
    else:
        keys = {
            **MODEL,
            "head_dim": 8,
            "rope_theta": 1.0,
            "rms_norm_eps": 1.0,
            "moe_capacity_factor": 1.0,
            "quantization": "none",
            "decoder_sparse_step": 2,
            "hidden_act": "silu",
        }
        if table is not tables and table is not tables["model"]:
            keys = {**TRAINING, "seed": 0, "gradient_accumulation_steps": 1, "keep_checkpoints": 1}
            if table is not tables["training"]:
                keys = dict.fromkeys(("learning_rate", "schedule", "beta1", "epsilon", "clip_norm"))
        table[rng.choice(sorted(keys))] = any_value(rng)
    if is_json:
        path.write_text(json.dumps(tables))
    else:
        path.write_text(tomli_w.dumps(without_none(tables)))
    return Case(arguments, codes)


LINES = [
    b'{"text": "fine"}',
    b'{"text": 5}',
    b'{"text": null}',
    b'{"txt": "x"}',
    b"[1, 2]",
    b'"text"',
    b"{",
    b"nul",
    b'{"text": "\\ud800"}',
    b'{"n": ' + LONG_NUMBER.encode() + b', "text": "x"}',
    b"[" * 100_000,
    b'{"text": "' + b"\xff" + b'"}',
    b'{"a": NaN, "text": "x y z"}',
    b'\xef\xbb\xbf{"text": "x"}',
    b'{"text": "a\x00b"}',
    b'{"text": " "}',
]
TEXTS = [
    b"",
    b" \n\n\n ",
    b"\xff\xfe",
    b"a\xc3",
    b"x",
    b"\0" * 50,
    b"a\r\rb",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
]


def corpora(rng: Random, folder: Path, material: Path) -> Case:
    """Text files that are none, for `eval` and `train`."""
    suffix = rng.choice([".txt", ".jsonl"])
    path = folder / f"corpus{suffix}"
    given, codes, how = path.name, TRAINED, rng.randrange(7)
    if how == 0:
        odd_place(rng, path)
        codes = BAD
    elif how == 1:
        path.write_bytes(rng.choice(TEXTS))
    elif how == 2:
        with path.open("wb") as file:
            file.truncate(1 << rng.choice([41, 42]))
        codes = BAD
    elif how == 3:
        given = rng.choice(
            ["", "none.txt", "*.txt", "nothing[", "**/*.jsonl", "a/b/c", "x" * 300, "/dev/null"]
        )
        codes = BAD
    elif how == 4:
        path = folder / os.fsdecode(b"corpus\xff" + suffix.encode())
        path.write_text('{"text": "the fox and the dog"}' if suffix == ".jsonl" else TEXT)
        given = path.name
    elif how == 5:
        (folder / "corpus.csv").write_text(TEXT)
        given, codes = rng.choice(["corpus.csv", "."]), BAD
    else:
        path.write_bytes(b"\n".join(rng.choices(LINES, k=rng.randrange(1, 4))))
    if rng.random() < 0.5:
        (folder / "config.toml").write_text(tomli_w.dumps(RUN))
        return Case(["train", "config.toml", "--data", given, "--out", "made", *NUMPY], codes)
    shutil.copytree(material / "checkpoint", folder / "checkpoint")
    return Case(["eval", "checkpoint", "--domain", f"a={given}", "--json", *NUMPY], codes)


READING = [
    ["eval", "--domain", "a=text.txt", "--json"],
    ["generate", "--prompt", "the", "--max-new-tokens", "3"],
    ["generate", "--prompt", "", "--temperature", "0"],
    ["inspect", "--json"],
    ["trace", "--tokens", "tokens.npy", "--out", "made.safetensors", "--no-grad"],
]


def checkpoints(rng: Random, folder: Path, material: Path) -> Case:
    """A checkpoint of which one file is changed, cut, gone or something else; or a run to resume."""
    (folder / "text.txt").write_text(TEXT)
    np.save(folder / "tokens.npy", np.ones((1, 5), np.int64))
    kind = rng.choice(["checkpoint", "bitnet", "packed", "run"])
    shutil.copytree(material / kind, folder / kind)
    commands = list(READING)
    if kind == "bitnet":
        commands.append(["pack", "--out", "made", "--json"])
    if kind == "packed":
        commands += [["unpack", "--out", "made"]] * 2
    arguments = [*rng.choice(commands), kind, *NUMPY]
    if kind == "run" and rng.random() < 0.7:
        arguments = ["train", "--resume", "run", "--set", "training.steps=2", *NUMPY]
    path = rng.choice([path for path in sorted((folder / kind).rglob("*")) if path.is_file()])
    content, how = path.read_bytes(), rng.randrange(5)
    if how == 0:
        path.unlink()
        odd_place(rng, path)
    elif how == 1:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == 2:
        place = rng.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    elif how == 3:
        path.write_bytes(content + rng.randbytes(rng.randrange(1, 30)))
    else:
        path.write_bytes(damaged(rng, content)[0])
    return Case(arguments, TRAINED)


def tokens(rng: Random, folder: Path, material: Path) -> Case:
    """Arrays of tokens for `trace`, most of them no such arrays."""
    shutil.copytree(material / "model", folder / "model")
    is_json = rng.random() < 0.5
    path = folder / ("tokens.json" if is_json else "tokens.npy")
    codes, how = PERHAPS, rng.randrange(4)
    if how == 0:
        odd_place(rng, path)
        codes = BAD
    elif is_json and how < 3:
        row = [
            rng.choice([1, 2, 299, 300, -1, -100, 2**63, 10**30, 1.5, True, None, "1", [1]])
            for _ in range(3)
        ]
        value = rng.choice([[row], [row, [1]], row, {"a": row}, [], [[]], [row] * 2, any_value(rng)])
        text = json.dumps(value)
        path.write_text(rng.choice([text, text, "[" * 100_000, f"[[1, {LONG_NUMBER}]]"]))
    elif is_json:
        path.write_bytes(damaged(rng, b"[[1, 2, 3, 4, 5, 6, 7]]\n")[0])
    else:
        shape = rng.choice([(1, 5), (2, 3), (5,), (0, 5), (3, 0), (1, 34), (1, 1), (1, 2, 3), ()])
        dtype = rng.choice(["<i8", ">i8", "u8", "i4", "u1", "f4", "?", "c8", "M8[s]", "S3", "V4", "i1"])
        array = np.zeros(shape, np.int8) if rng.random() < 0.9 else np.full(shape, 99, np.int8)
        buffer = io.BytesIO()
        np.save(buffer, array.astype(dtype))
        content = buffer.getvalue()
        if how == 1:
            content = damaged(rng, content)[0]
        elif how == 2:
            claimed = rng.choice(
                ["(1, 1000000000000)", "(-1, 5)", "(10**9, 10**9)", "(1, 2.5)", "'x'", "((1,),)"]
            )
            content = content.replace(str(shape).encode(), claimed.encode())
        path.write_bytes(content)
    arguments = ["trace", "model", "--tokens", path.name, "--out", "made.safetensors", *NUMPY]
    return Case(arguments, codes)


def tokenizers(rng: Random, folder: Path, material: Path) -> Case:
    """Tokenizer files, in a checkpoint or for a run."""
    (folder / "text.txt").write_text(TEXT)
    text = (material / "checkpoint" / "tokenizer.json").read_text()
    codes = TRAINED
    if rng.random() < 0.5:
        path = folder / "tokenizer.json"
        (folder / "config.toml").write_text(tomli_w.dumps(RUN))
        arguments = ["train", "config.toml", "--data", "text.txt", "--out", "made", *NUMPY]
        arguments += ["--set", "data.tokenizer=tokenizer.json"]
    else:
        shutil.copytree(material / "checkpoint", folder / "checkpoint")
        path = folder / "checkpoint" / "tokenizer.json"
        path.unlink()
        arguments = ["eval", "checkpoint", "--domain", "a=text.txt", "--json", *NUMPY]
        if rng.random() < 0.5:
            arguments = ["generate", "checkpoint", "--prompt", "the fox", *NUMPY]
    how = rng.randrange(4)
    if how == 0:
        odd_place(rng, path)
        codes = BAD
    elif how == 1:
        path.write_bytes(damaged(rng, text.encode())[0])
    else:
        value = json.loads(text)
        part = rng.choice([value, value["model"], value["model"]["vocab"], value["added_tokens"][0]])
        key = rng.choice(sorted(part))
        if how == 2:
            part[key] = any_value(rng)
        else:
            rng.choice([part.clear, lambda: part.pop(key), lambda: part.update({key: 2**32 - 1})])()
        path.write_text(json.dumps(value))
    return Case(arguments, codes)


ODD_TEXTS = [
    "",
    "x",
    "0",
    "-1",
    "999999",
    "10" * 30,
    "²",
    " ",
    "/dev/null",
    "/nonexistent/x",
    "1.5",
    "\udcff",
    "nan",
]


def environments(rng: Random, folder: Path, material: Path) -> Case:
    """Odd values of variables that the program or its libraries read."""
    (folder / "text.txt").write_text(TEXT)
    shutil.copytree(material / "checkpoint", folder / "checkpoint")
    name = rng.choice(
        [
            *("NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_OPT", "MHMOE_NP_ISA"),
            "MHMOE_NP_BLAS",
            *(
                "COLUMNS",
                "LINES",
                "TMPDIR",
                "TERM",
                "NO_COLOR",
                "FORCE_COLOR",
                "HOME",
                "XDG_CACHE_HOME",
            ),
            *("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"),
            *(
                "LC_ALL",
                "LANG",
                "NUMBA_THREADING_LAYER_PRIORITY",
                "NUMBA_DEBUG_CACHE",
                "OPENBLAS_CORETYPE",
            ),
        ]
    )
    value = rng.choice(ODD_TEXTS)
    if name == "OPENBLAS_CORETYPE" or (name == "RAYON_NUM_THREADS" and len(value) > 3):
        value = "x"  # the library ends the process itself over some
    environment = {name: value}
    if rng.random() < 0.3:
        environment["PYTHONIOENCODING"] = rng.choice(["ascii", "latin-1", "ascii:strict"])
    backend = ["--backend", rng.choice(["numpy", "numba"])]
    arguments = rng.choice(
        [
            ["--help"],
            ["parity"],
            ["eval", "--help"],
            [
                "eval",
                "checkpoint",
                "--domain",
                rng.choice(["ü[red]x[/]=text.txt", "[/]=text.txt"]),
                *backend,
            ],
            ["generate", "checkpoint", "--prompt", "ü the", "--max-new-tokens", "4", *backend],
            ["inspect", "checkpoint", *backend],
        ]
    )
    return Case(arguments, PERHAPS, environment)


OPTIONS: dict[str, list[str]] = {
    "train": [
        "--preset",
        "--data",
        "--steps",
        "--seed",
        "--threads",
        "--checkpoint-every",
        "--eval-every",
        "--resume",
        "--set",
    ],
    "eval": [
        "--domain",
        "--protocol",
        "--window",
        "--stride",
        "--bos",
        "--batch-tokens",
        "--threads",
        "--backend",
    ],
    "generate": [
        "--prompt",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--stop",
        "--prompts",
        "--batch-size",
        "--seed",
        "--threads",
    ],
    "init": ["--out", "--seed"],
    "trace": ["--tokens", "--out", "--dtype", "--only", "--stop-at", "--threads"],
    "compare": ["--checkpoint", "--names", "--tolerance"],
    "pack": ["--out", "--format", "--threads"],
    "unpack": ["--out"],
    "inspect": ["--threads", "--backend"],
    "gradcheck": ["--backend"],
    "audit": ["--backend", "--html"],
    "parity": [
        "--heads",
        "--top-k",
        "--hidden-size",
        "--baseline-experts",
        "--baseline-intermediate-size",
        "--ffn",
    ],
}
ODD_ARGUMENTS = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "nan",
        "inf",
        "-inf",
        "1e-320",
        "1e400",
        "0.5",
        "x",
        "\udcff",
        "a=b",
        "=x",
        "a=",
    ),
    *(
        "10" * 15,
        "9" * 5000,
        "1_0",
        "٣",
        "--",
        "-",
        ".",
        "..",
        "/",
        "/dev/null",
        "text.txt",
        "model",
        "a\nb",
        "auto",
    ),
    *(
        "model.hidden_size=" + "[" * 3000,
        "seed=" + LONG_NUMBER,
        "steps=1\nseed=2",
        "seed=-1",
        "vocab_size=10000000000",
    ),
    *(
        "data.tokenizer=",
        "data.paths=['']",
        'data.paths=["a\\u0000"]',
        "moe_heads=7",
        "head_dim=3",
        "x" * 4000,
    ),
]


def command_lines(rng: Random, folder: Path, material: Path) -> Case:
    """Options with odd values, options left away, words that are no commands."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "config.toml").write_text(tomli_w.dumps(RUN))
    np.save(folder / "tokens.npy", np.ones((1, 5), np.int64))
    np.savez(folder / "trace.npz", input_ids=np.ones((1, 4), np.int64), logits=np.ones((1, 4, 300)))
    shutil.copytree(material / "checkpoint", folder / "model")
    name = rng.choice([*OPTIONS, "plan", "pack", rng.choice(["", "trian", "-x", "--versio"])])
    usual: dict[str, list[str]] = {
        "train": ["config.toml", "--data", "text.txt", "--out", "made", *NUMPY],
        "eval": ["model", "--domain", "a=text.txt", *NUMPY],
        "generate": ["model", "--prompt", "the", *NUMPY],
        "init": ["config.json", "--out", "made", "--seed", "0"],
        "trace": ["model", "--tokens", "tokens.npy", "--out", "made.safetensors", *NUMPY],
        "compare": ["trace.npz", "--checkpoint", "model"],
        "pack": ["model", "--out", "made", *NUMPY],
        "unpack": ["model", "--out", "made", *NUMPY],
        "inspect": ["model", *NUMPY],
    }
    if name in ("gradcheck", "audit"):  # the real thing takes long
        return Case([name, rng.choice([word for word in ODD_ARGUMENTS if word != "--"])], BAD)
    if name == "plan":
        return Case(
            [name, "config.toml", "--set", rng.choice(["vocab_size=2000000000", "steps=0", "a", ""])],
            BAD,
        )
    arguments = list(usual.get(name, []))
    if rng.random() < 0.2 and arguments:
        arguments.pop(rng.randrange(len(arguments)))
    for _ in range(rng.randrange(1, 3)):
        option, value = rng.choice(OPTIONS.get(name, ["--x"])), rng.choice(ODD_ARGUMENTS)
        if option == "--steps" and value == "10" * 15:
            value = "0"
        arguments += [option, value] if rng.random() < 0.9 else [option]
    return Case([name, *arguments], TRAINED)


CATEGORIES: list[Maker] = [
    configs,
    corpora,
    checkpoints,
    tokens,
    tokenizers,
    environments,
    command_lines,
]
