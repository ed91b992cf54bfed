"""Text of every form through the commands: prepared, trained on, mixed, resumed, scored."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.resume import digests, prepare

NUMPY = ("--backend", "numpy")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two domains in files of several forms, and a configuration."""
    prepare(tmp_path, steps=4)
    words = ["the", "whale", "a", "ship", "of", "old", "sea", "and", "land", "with", "many", "men"]
    for name, step in (("one", 1), ("two", 3)):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"body": " ".join(words[(n * step + k) % len(words)] for k in range(12))}) + "\n"
            for n in range(60)
        ]
        (tmp_path / name / "a.jsonl").write_text("".join(lines[:30]))
        (tmp_path / name / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    return tmp_path


PREPARE = (
    *("prepare", "--domain", "one=one", "--domain", "two=two/*", "--text-key", "body"),
    *("--vocab-size", 280, "--workers", 1, "--validation-fraction", "0.2"),
)


def test_a_store_is_prepared_trained_on_resumed_and_scored(mhmoe_here: Run, texts: Path) -> None:
    said = mhmoe_here(*PREPARE, "--weight", "one=3", "--weight", "two=1", "--out", "store").stdout
    assert "one: 48 documents" in said
    assert "held-out lines" in said
    assert "next: mhmoe-np train --data store" in said
    options = ("train", "config.toml", "--data", "store", *NUMPY)
    first = mhmoe_here(*options, "--out", "whole")
    assert "held-out lines" in first.stderr
    assert {"one", "two"} == set(json.loads((texts / "whole/evaluation.json").read_text())["domains"])
    # In two sittings the same bits, though the store is read from elsewhere.
    mhmoe_here(*options, "--out", "halves", "--steps", 2)
    mhmoe_here("train", "--resume", "halves", "--steps", 4, *NUMPY)
    assert digests(texts / "halves") == digests(texts / "whole")
    # The weights decide the batches: others make another run.
    mhmoe_here(*options, "--out", "other", "--set", "data.weights={one=1, two=9}")
    assert (
        digests(texts / "other")["model.safetensors"] != digests(texts / "whole")["model.safetensors"]
    )
    scores = mhmoe_here("eval", "whole", "--domain", "x=one", "--text-key", "body", "--json", *NUMPY)
    assert json.loads(scores.stdout)["domains"]["x"]["words"] == 60 * 12


def test_the_same_text_given_to_train_makes_the_same_run(mhmoe_here: Run, texts: Path) -> None:
    settings = ("--set", "data.validation_fraction=0.2", "--set", "data.text_key=body")
    domains = ("--set", 'data.domains={one="one", two="two/*"}')
    mhmoe_here("train", "config.toml", *domains, *settings, "--out", "direct", *NUMPY)
    vocabulary = json.loads((texts / "direct/data/store.json").read_text())["vocab_size"]
    tokenizer = ("--tokenizer", "direct/tokenizer.json")
    without = [value for value in PREPARE if value not in ("--vocab-size", 280)]
    mhmoe_here(*without, *tokenizer, "--out", "store")
    mhmoe_here("train", "config.toml", "--data", "store", *settings, "--out", "stored", *NUMPY)
    assert vocabulary > 257
    one, other = digests(texts / "direct"), digests(texts / "stored")
    assert one["model.safetensors"] == other["model.safetensors"]


def test_a_store_that_changed_or_went_is_named(mhmoe_here: Run, texts: Path) -> None:
    mhmoe_here(*PREPARE, "--out", "store")
    mhmoe_here("train", "config.toml", "--data", "store", "--out", "run", "--steps", 2, *NUMPY)
    resume = ("train", "--resume", "run", "--steps", 3, *NUMPY)
    shard = texts / "store" / "data" / "one-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\xff")
    assert "one-00000.bin: damaged" in mhmoe_here(*resume, code=2).stderr
    shard.write_bytes(content)
    (texts / "store").rename(texts / "kept")
    mhmoe_here(*PREPARE, "--seed", 1, "--out", "store")
    assert "is another store than run was started with" in mhmoe_here(*resume, code=2).stderr
    (texts / "store").rename(texts / "another")
    assert "the store of run is not there; put it back" in mhmoe_here(*resume, code=2).stderr
    (texts / "kept").rename(texts / "store")
    mhmoe_here(*resume)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "--out", "made"), "no text was named"),
        (("prepare", "one", "--weight", "one=0", "--out", "made"), "must be a number above 0"),
        (("prepare", "one", "--weight", "two=1", "--out", "made"), "weight of 'two': there is no such"),
        (
            ("prepare", "one", "two", "--weight", "two=1", "--out", "made"),
            "domain 'one': has no weight",
        ),
        (("prepare", "one", "--domain", "one=two", "--out", "made"), "domain 'one': is given twice"),
        (("prepare", "--domain", "a/b=two", "--out", "made"), "domain 'a/b': files get this name"),
        (("prepare", "one", "--domain", "x", "--out", "made"), "--domain 'x': must be NAME=PATH"),
        (("prepare", "one", "--out", "two"), "two: exists already"),
        (("prepare", "one", "--out", "made"), 'a.jsonl:1: has no string "text"'),
        (("prepare", "one", "--tokenizer", "config.toml", "--out", "made"), "holds no tokenizer"),
        (("tokenizer", "train", "one", "--text-key", "body", "--out", "config.toml"), "exists already"),
        (
            ("tokenizer", "train", "one", "--vocab-size", 9, "--text-key", "body", "--out", "t"),
            "below 257",
        ),
        (
            (
                "tokenizer",
                "train",
                "one",
                "--special",
                "<|endoftext|>",
                "--text-key=body",
                "--out",
                "t",
            ),
            "special token '<|endoftext|>': must have a name of its own",
        ),
        (("tokenizer", "inspect", "none.json"), "none.json: no such file"),
        (
            ("train", "config.toml", "--set", "data.weights={x=1}", "--out", "made", *NUMPY),
            "weight of 'x': there is no such domain",
        ),
    ],
)
def test_bad_input_ends_in_one_line(
    mhmoe_here: Run, texts: Path, arguments: tuple[object, ...], message: str
) -> None:
    said = mhmoe_here(*arguments, code=2).stderr
    assert message in said.splitlines()[-1]
    assert not (texts / "made").exists()
    assert not list(texts.glob(".tmp-*"))


def test_a_store_must_be_given_alone_and_fit_the_model(mhmoe_here: Run, texts: Path) -> None:
    mhmoe_here(*PREPARE, "--out", "store")
    train = ("train", "config.toml", "--data", "store", "--out", "run", *NUMPY)
    assert "store: is a store; give it alone" in mhmoe_here(*train, "--data", "one", code=2).stderr
    small = mhmoe_here(*train, "--set", "vocab_size=260", code=2).stderr
    assert "store: has 280 ids, more than model.vocab_size 260" in small
    mhmoe_here(
        "tokenizer", "train", "one", "--text-key", "body", "--out", "t.json", "--vocab-size", 270
    )
    other = mhmoe_here(*train, "--set", "data.tokenizer=t.json", code=2).stderr
    assert "store: was made with another tokenizer than t.json" in other
    assert not (texts / "run").exists()


def test_a_tokenizer_is_trained_and_looked_at(mhmoe_here: Run, texts: Path) -> None:
    options = (
        "--vocab-size",
        290,
        "--special",
        "<|user|>",
        "--special",
        "<|end|>",
        "--text-key",
        "body",
    )
    assert (
        "t.json: 290 tokens"
        in mhmoe_here("tokenizer", "train", "one", *options, "--out", "t.json").stdout
    )
    inspect = ("tokenizer", "inspect", "t.json", "--text-key", "body", "--domain", "x=two")
    found = json.loads(mhmoe_here(*inspect, "--json").stdout)
    assert found["special_tokens"] == {"<|endoftext|>": 0, "<|user|>": 1, "<|end|>": 2}
    domain = found["domains"]["x"]
    lines = (texts / "two" / "a.jsonl").read_text().splitlines()
    lines += gzip.decompress((texts / "two" / "b.jsonl.gz").read_bytes()).decode().splitlines()
    bodies = [json.loads(line)["body"] for line in lines]
    assert domain["words"] == sum(len(body.split()) for body in bodies)
    assert domain["bytes"] == sum(len(body.encode()) for body in bodies)
    assert domain["bytes_per_token"] == domain["bytes"] / domain["tokens"]
    assert domain["tokens_per_word"] == domain["tokens"] / domain["words"]
    shown = mhmoe_here(*inspect).stdout
    assert "special token 1: <|user|>" in shown
    assert f"{domain['tokens']:,}" in shown
