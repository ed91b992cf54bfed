import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mhmoe_np.data import store
from mhmoe_np.data.documents import embedded_domains
from mhmoe_np.data.store import open_store, tokenise, write_store
from mhmoe_np.data.tokenizer import tokenizer_sha256, train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.storage import files


@pytest.fixture
def path(documents, tokenizer, tmp_path):
    """A store with a name that has a dot in it."""
    path = tmp_path / "train.v1"
    write_store(path, documents, tokenizer, name="lexicon")
    return path


def word_level(size: int) -> Tokenizer:
    return Tokenizer(models.WordLevel({"</s>": 0, "last": size - 1}))


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=6))
def test_documents_are_separated_by_one_end_of_text(tokenizer, texts):
    token_W = tokenise(texts, tokenizer)
    separators = np.flatnonzero(token_W == 0)
    assert len(separators) == max(0, len(texts) - 1)
    pieces = np.split(token_W, separators)
    joined = [pieces[0].tolist(), *(piece[1:].tolist() for piece in pieces[1:])]
    assert [tokenizer.decode(piece) for piece in joined] == (texts or [""])


def test_the_chunks_leave_no_mark_on_the_tokens(documents, tokenizer, monkeypatch):
    token_W = tokenise(documents, tokenizer)
    monkeypatch.setattr(store, "CHARACTERS_PER_CHUNK", 1000)
    np.testing.assert_array_equal(tokenise(documents, tokenizer), token_W)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_dtype_is_the_narrowest_that_holds_every_id(tmp_path, size, dtype):
    tokenizer = word_level(size)
    opened = write_store(tmp_path / "a", ["last", "last"], tokenizer, name="a")
    assert opened.token_W.dtype == dtype
    assert opened.header.dtype == np.dtype(dtype).name
    assert opened.header.vocab_size == size
    assert opened.token_W.tolist() == [size - 1, 0, size - 1]


def test_a_megabyte_in_one_document_takes_seconds(documents):
    text = "\n".join(text for domain in embedded_domains() for text in domain.documents)[:1_000_000]
    tokenizer = train_tokenizer(documents, vocab_size=2000)
    started = time.perf_counter()
    for document in (text, "a" * 1_000_000):
        tokenise([document], tokenizer)
    assert time.perf_counter() - started < 10


def test_a_text_the_tokenizer_cannot_encode_is_refused():
    with pytest.raises(UserError, match=r"tokenizer: cannot encode the text: .*; use a byte-level"):
        tokenise(["unknown"], word_level(10))


def test_a_store_reads_back_as_written(path, documents, tokenizer):
    opened = open_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    np.testing.assert_array_equal(opened.token_W, tokenise(documents, tokenizer))
    assert isinstance(opened.token_W, np.memmap)
    assert not opened.token_W.flags.writeable


def test_the_sidecar_states_the_counts_of_the_documents(path, documents, tokenizer):
    assert json.loads(path.with_name("train.v1.json").read_text()) == {
        "version": 2,
        "name": "lexicon",
        "dtype": "uint16",
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "vocab_size": 500,
        "documents": 40,
        "tokens": path.with_name("train.v1.bin").stat().st_size // 2,
        "bytes": sum(len(document.encode()) for document in documents),
        "words": sum(len(document.split()) for document in documents),
    }


def test_a_store_of_version_1_is_read(path, tokenizer):
    expected = open_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    sidecar = path.with_name("train.v1.json")
    old = {"version": 1, "document_offsets": list(range(40))}
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | old))
    opened = open_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    assert opened.header == expected.header
    np.testing.assert_array_equal(opened.token_W, expected.token_W)


def test_a_store_is_two_files_and_is_replaced_by_a_second_write(path, tokenizer):
    opened = write_store(path, ["other text"], tokenizer, name="other")
    assert (opened.header.name, opened.header.documents) == ("other", 1)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "train.v1.bin",
        "train.v1.json",
    ]


@pytest.mark.parametrize("failing", ["write_atomically", "write_json"])
def test_an_interrupted_rewrite_leaves_nothing_that_opens(path, tokenizer, monkeypatch, failing):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, ["other text"], tokenizer, name="other")
    with pytest.raises(UserError, match=r"train\.v1\.json: no such file; tokenise the text"):
        open_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))


@pytest.mark.parametrize("texts", [[], [""]])
def test_a_store_of_nothing_is_refused(tmp_path, tokenizer, texts):
    with pytest.raises(UserError, match="empty: has no token to store"):
        write_store(tmp_path / "a", texts, tokenizer, name="empty")
    assert not list(tmp_path.iterdir())


def refusal(path, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        open_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("; tokenise the text again")
    return message


@pytest.mark.parametrize("suffix", ["bin", "json"])
def test_a_store_with_a_file_missing_is_refused(path, tokenizer, suffix):
    path.with_name(f"train.v1.{suffix}").unlink()
    assert re.search(rf"train\.v1\.{suffix}: .*no such file", refusal(path, tokenizer), re.IGNORECASE)


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data + b"\0", lambda _: b""])
def test_a_store_of_the_wrong_size_is_refused(path, tokenizer, change):
    token_path = path.with_name("train.v1.bin")
    size = token_path.stat().st_size
    token_path.write_bytes(change(token_path.read_bytes()))
    expected = f"train.v1.bin: has {token_path.stat().st_size} bytes, not {size}"
    assert expected in refusal(path, tokenizer)


def test_a_store_of_another_tokenizer_is_refused(path, documents):
    other = train_tokenizer(documents, vocab_size=400)
    assert "train.v1.json: was made with another tokenizer" in refusal(path, other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, "is not a token store of version 1 or 2 (got 3)"),
        ("version", None, "is not a token store of version 1 or 2 (got None)"),
        ("dtype", "int64", "dtype: "),
        ("tokens", "7", "tokens: "),
        ("documents", 0, "documents: "),
        ("document_offsets", [0], "unknown key 'document_offsets'"),
        ("colour", "red", "unknown key 'colour'"),
    ],
)
def test_an_edited_sidecar_is_refused_by_its_key(path, tokenizer, key, value, message):
    sidecar = path.with_name("train.v1.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {key: value}))
    assert f"train.v1.json: {message}" in refusal(path, tokenizer)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"version": 1}', b'{"version": 2}', b"[" * 100_000]
)
def test_a_foreign_sidecar_is_refused(path, tokenizer, content):
    path.with_name("train.v1.json").write_bytes(content)
    assert re.search(r"train\.v1\.json: ", refusal(path, tokenizer))
