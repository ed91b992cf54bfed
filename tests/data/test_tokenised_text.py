"""A text on disk as tokens, against the same text in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenised_text import tokenise_documents, tokenise_text

documents_of_text = st.lists(
    st.text(st.sampled_from("ab .\n\u00fc\u2003\x1c"), min_size=1, max_size=60).filter(str.strip),
    min_size=1,
    max_size=6,
)


@given(documents=documents_of_text, piece=st.sampled_from([7, 11, 1 << 20]))
def test_tokens_counts_and_hash_are_those_of_the_documents(
    tokenizer: Tokenizer, documents: list[str], piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pieces", "read_file", "chunks"):
            patch.setattr(f"mhmoe_np.data.{module}.PIECE", piece)
        patch.setattr("mhmoe_np.data.pieces.TAIL", piece - 1)
        text = tokenise_documents("a", documents, tokenizer)
    assert text.token_W.tolist() == tokenise(documents, tokenizer).tolist()
    lengths = [len(tokenise([document], tokenizer)) for document in documents]
    assert text.tokens_of_documents.tolist() == lengths
    assert text.largest_id == max(text.token_W, default=0)
    size = sum(len(document.encode()) for document in documents)
    assert text.byte_count == text.document_bytes == size
    assert text.word_count == sum(len(document.split()) for document in documents)
    assert text.split_words == sum(len(re.split(r"\s+", document)) for document in documents)
    each = b"".join(hashlib.sha256(document.encode()).digest() for document in documents)
    assert text.corpus_sha256 == hashlib.sha256(each).hexdigest()


def test_files_of_any_kind_with_the_same_documents_are_the_same_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = ["one\n\ntwo", "drei \u00fc"]
    (tmp_path / "a.txt").write_text("\n\n\n".join(documents))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    told: list[tuple[str, int, int]] = []
    plain, lines = (
        tokenise_text("a", tmp_path / name, tokenizer, on_progress=lambda *said: told.append(said))
        for name in ("a.txt", "a.jsonl")
    )
    for name in ("corpus_sha256", "document_bytes", "split_words", "word_count"):
        assert getattr(plain, name) == getattr(lines, name)
    assert np.array_equal(plain.token_W, lines.token_W)
    assert plain.byte_count == lines.byte_count + 3  # its separator
    size = (tmp_path / "a.jsonl").stat().st_size
    assert told[-1] == ("tokenising a", size, size)


def test_the_tokens_are_read_only_and_leave_no_file(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = tokenise_documents("a", ["some text"], tokenizer)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="read-only"):
        text.token_W[0] = 1


def test_a_disk_that_is_full_is_named(tokenizer: Tokenizer) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as caught:
            tokenise_documents("a", ["some text " * 1000], tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == tempfile.gettempdir()
