"""A store: what it holds, what it says of itself, and that damage to it is found."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mhmoe_np.data import prepare, shards
from mhmoe_np.data.prepare import PreparationSettings, is_unfinished, prepare_store, prepare_text
from mhmoe_np.data.sources import find_sources
from mhmoe_np.data.store import (
    StoreHeader,
    check_store,
    open_streams,
    read_header,
)
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenizer import load_tokenizer, tokenizer_sha256
from mhmoe_np.errors import UserError
from mhmoe_np.progress import unseen

SETTINGS = PreparationSettings(vocab_size=400, validation_fraction=0.2)


def write_texts(folder: Path, documents) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("\n\n\n".join(documents[:25]))
    lines = [json.dumps({"text": text}) + "\n" for text in documents[25:]]
    (folder / "b.jsonl").write_text("".join(lines))
    return [str(folder / "a.txt"), str(folder / "b.jsonl")]


def made(out: Path, paths, *, tokenizer=None, workers=1, settings=SETTINGS, on_progress=unseen) -> Path:
    prepare_store(
        out,
        find_sources(paths),
        settings,
        tokenizer=tokenizer,
        workers=workers,
        on_progress=on_progress,
    )
    return out


def digests(folder: Path) -> dict[str, str]:
    """File name -> sha256, of everything."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def held_out(store: Path, name: str) -> list[str]:
    lines = (store / "validation" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture
def store(documents, tokenizer, tmp_path, monkeypatch):
    """Shards of few tokens, each of a chunk or more."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    monkeypatch.setattr("mhmoe_np.data.chunks.PIECE", 800)
    return made(tmp_path / "store", write_texts(tmp_path / "texts", documents), tokenizer=tokenizer)


def test_every_document_is_a_training_document_or_held_out(store, documents, tokenizer):
    streams = open_streams(store, tokenizer_sha256=tokenizer_sha256(tokenizer))
    header = read_header(store)
    assert [domain.name for domain in header.domains] == ["a", "b"]
    training = {}
    for domain, texts in (("a", documents[:25]), ("b", documents[25:])):
        out = held_out(store, domain)
        assert out
        training[domain] = [text for text in texts if text not in out]
        assert len(out) + len(training[domain]) == len(texts)
    everything = tokenise(training["a"] + training["b"], tokenizer)
    found = np.concatenate([stream.take(np.arange(len(stream))) for stream in streams])
    np.testing.assert_array_equal(found, everything)
    assert header.tokens == len(everything)
    assert [domain.documents for domain in header.domains] == [len(training[name]) for name in "ab"]
    assert all(len(domain.shards) > 1 for domain in header.domains)


def test_the_index_says_where_each_document_begins(store, tokenizer):
    domain = read_header(store).domains[1]
    texts = []
    for shard in domain.shards:
        token_W = np.fromfile(store / "data" / shard.file, "<u2")
        starts = np.fromfile(store / "data" / shard.index, "<u8").tolist()
        assert len(starts) == shard.documents
        # Before each stands the end of the one before, at which this piece of text is cut.
        ends = [start - 1 for start in starts[1:]] + [len(token_W)]
        texts += [tokenizer.decode(token_W[a:b]) for a, b in zip(starts, ends, strict=True)]
    lines = (store.parent / "texts" / "b.jsonl").read_text().splitlines()
    out = held_out(store, "b")
    assert texts == [text for line in lines if (text := json.loads(line)["text"]) not in out]


def test_the_header_has_the_sha256_of_each_file_of_tokens(store):
    for domain in read_header(store).domains:
        for shard in domain.shards:
            for name, sha256 in ((shard.file, shard.sha256), (shard.index, shard.index_sha256)):
                content = (store / "data" / name).read_bytes()
                assert hashlib.sha256(content).hexdigest() == sha256


def test_several_processes_leave_no_mark_on_the_store(store, tmp_path):
    paths = [str(tmp_path / "texts" / name) for name in ("a.txt", "b.jsonl")]
    tokenizer = load_tokenizer(store / "tokenizer.json")
    other = made(tmp_path / "other", paths, tokenizer=tokenizer, workers=2)
    assert digests(other) == digests(store)


class Stop(BaseException):
    """As a signal's handler raises it."""


def test_what_was_interrupted_goes_on_and_ends_with_the_same_bytes(
    store, documents, tokenizer, tmp_path, monkeypatch
):
    paths = [str(tmp_path / "texts" / name) for name in ("a.txt", "b.jsonl")]
    expected = digests(store)
    encoded = []
    original = shards._OpenShard.add
    stop_at = 0

    def add(self, chunk, *arguments, **named):
        encoded.append(chunk)
        if len(encoded) == stop_at:
            raise Stop
        original(self, chunk, *arguments, **named)

    monkeypatch.setattr(shards._OpenShard, "add", add)
    made(tmp_path / "all", paths, tokenizer=tokenizer)
    everything = len(encoded)
    for stop_at in (2, everything // 2, everything):
        encoded.clear()
        out = tmp_path / f"out-{stop_at}"
        with pytest.raises(Stop):
            made(out, paths, tokenizer=tokenizer)
        assert not out.exists()
        before, stopped_at = len(encoded), stop_at
        stop_at = -1
        encoded.clear()
        made(out, paths, tokenizer=tokenizer)
        assert digests(out) == expected
        if stopped_at > everything / 2:
            assert len(encoded) < everything - before / 3


def test_other_text_or_settings_begin_again(store, documents, tokenizer, tmp_path, monkeypatch):
    paths = [str(tmp_path / "texts" / name) for name in ("a.txt", "b.jsonl")]
    (tmp_path / "half").mkdir()

    def stop(**_: object) -> None:
        raise Stop

    monkeypatch.setattr(prepare, "StoreHeader", stop)
    with pytest.raises(Stop):
        prepare_text(tmp_path / "half", find_sources(paths), SETTINGS, tokenizer=tokenizer, workers=1)
    monkeypatch.setattr(prepare, "StoreHeader", StoreHeader)
    assert is_unfinished(tmp_path / "half")
    other = PreparationSettings(vocab_size=400, validation_fraction=0.2, seed=1)
    prepare_text(tmp_path / "half", find_sources(paths), other, tokenizer=tokenizer, workers=1)
    assert not is_unfinished(tmp_path / "half")
    expected = made(tmp_path / "expected", paths, tokenizer=tokenizer, settings=other)
    wanted = {k: v for k, v in digests(expected).items() if k != "checksums.json"}
    assert digests(tmp_path / "half") == wanted


def test_a_bad_line_late_in_the_text_leaves_nothing(documents, tokenizer, tmp_path):
    paths = write_texts(tmp_path / "texts", documents)
    with open(paths[1], "a") as file:
        file.write("{")
    with pytest.raises(UserError, match=r"b\.jsonl:16: is not JSON"):
        made(tmp_path / "store", paths, tokenizer=tokenizer)
    assert [entry.name for entry in tmp_path.iterdir()] == ["texts"]


def test_a_flipped_bit_in_any_file_is_found(store):
    files = [path for path in store.rglob("*") if path.is_file()]
    assert len(files) > 8
    check_store(store)
    for path in files:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            check_store(store)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "version: "),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"domains": []}, "domains: "),
    ],
)
def test_an_edited_header_is_refused_by_its_key(store, change, message):
    path = store / "data" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"store\.json: {message}.*prepare the text again"):
        read_header(store)


def test_lines_in_both_parts_are_counted(tokenizer, tmp_path):
    common = [f"common line {n}" for n in range(3)]
    documents = [
        "\n".join([f"own line {number} of text", *common[: number % 4], ""]) for number in range(40)
    ]
    (tmp_path / "a.txt").write_text("\n\n\n".join(documents))
    store = made(tmp_path / "store", [str(tmp_path / "a.txt")], tokenizer=tokenizer)
    out = [line for text in held_out(store, "a") for line in text.split("\n") if line.strip()]
    found = read_header(store).lines_in_both
    assert found.held_out_lines == len(out)
    assert found.shared == sum(line in common for line in out) > 0
    assert not found.is_estimate


def test_progress_reaches_the_whole_of_each_stage(documents, tokenizer, tmp_path):
    told = []
    paths = write_texts(tmp_path / "texts", documents)
    made(tmp_path / "store", paths, tokenizer=tokenizer, on_progress=lambda *what: told.append(what))
    size = sum(Path(path).stat().st_size for path in paths)
    assert [name for name, done, total in told if done == size == total] == [
        "reading",
        "holding out",
        "tokenising",
    ]


def test_a_killed_process_that_encodes_ends_in_one_line(documents, tokenizer, tmp_path, monkeypatch):
    paths = write_texts(tmp_path / "texts", documents)
    monkeypatch.setattr("mhmoe_np.data.encoding_pool.sys.executable", "/bin/true")
    with pytest.raises(UserError, match=r"a process that encodes text ended .* --workers"):
        made(tmp_path / "store", paths, tokenizer=tokenizer, workers=2)
