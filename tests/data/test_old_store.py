"""Stores of older releases, written by hand as those wrote them."""

import json
import re

import numpy as np
import pytest

from mhmoe_np.data.old_store import open_old_store
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenizer import tokenizer_sha256, train_tokenizer
from mhmoe_np.errors import UserError


@pytest.fixture
def path(documents, tokenizer, tmp_path):
    """A store with a name that has a dot in it."""
    token_W = tokenise(documents, tokenizer)
    (tmp_path / "train.v1.bin").write_bytes(token_W.tobytes())
    header = {
        "version": 2,
        "name": "lexicon",
        "dtype": "uint16",
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "vocab_size": 500,
        "documents": len(documents),
        "tokens": len(token_W),
        "bytes": 1000,
        "words": 100,
    }
    (tmp_path / "train.v1.json").write_text(json.dumps(header))
    return tmp_path / "train.v1"


def test_a_store_is_read(path, documents, tokenizer):
    token_W = open_old_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    np.testing.assert_array_equal(token_W, tokenise(documents, tokenizer))
    assert isinstance(token_W, np.memmap)
    assert not token_W.flags.writeable


def test_a_store_of_version_1_is_read(path, tokenizer):
    expected = open_old_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    sidecar = path.with_name("train.v1.json")
    older = {"version": 1, "document_offsets": list(range(40))}
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | older))
    found = open_old_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
    np.testing.assert_array_equal(found, expected)


def refusal(path, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        open_old_store(path, tokenizer_sha256=tokenizer_sha256(tokenizer))
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
