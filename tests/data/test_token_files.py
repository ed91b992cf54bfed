"""Token files of nanoGPT, llm.c and Megatron, written by hand as those programs write them."""

import json
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mhmoe_np.data.prepare import PreparationSettings, prepare_store
from mhmoe_np.data.sources import find_sources
from mhmoe_np.data.store import open_streams, read_header
from mhmoe_np.data.token_files import read_token_pieces
from mhmoe_np.data.tokenizer import tokenizer_sha256
from mhmoe_np.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
END = 0


def nanogpt(path: Path) -> None:
    """Each document is followed by an end of text."""
    ids = [token for document in DOCUMENTS for token in [*document, END]]
    path.write_bytes(np.array(ids, dtype="<u2").tobytes())


def llm_c(path: Path, magic: int, version: int, dtype: str) -> None:
    """Each document is preceded by one."""
    ids = [token for document in DOCUMENTS for token in [END, *document]]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())


def megatron(path: Path, code: int, dtype: str) -> None:
    """Two of the documents are of two sequences each; the first has its end of text with it."""
    sequences = [[5, 6, 7, END], [8], [9, 10], [11, 12], [13], [14]]
    starts = [0, 1, 2, 4, 6]
    path.write_bytes(np.array(list(chain(*sequences)), dtype=dtype).tobytes())
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    width = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype("<i8") * width
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
        + lengths.tobytes()
        + pointers.tobytes()
        + np.array(starts, dtype="<i8").tobytes()
    )


WRITERS = {
    "nanogpt": nanogpt,
    "llm.c gpt-2": lambda path: llm_c(path, 20240520, 1, "<u2"),
    "llm.c llama-3": lambda path: llm_c(path, 20240801, 7, "<u4"),
    "megatron uint16": lambda path: megatron(path, 8, "<u2"),
    "megatron int32": lambda path: megatron(path, 4, "<i4"),
    "megatron int64": lambda path: megatron(path, 5, "<i8"),
}


def documents_of(path: Path, id_count: int = 500) -> list[list[int]]:
    found: list[list[int]] = []
    for piece in read_token_pieces(path, end_of_text=END, id_count=id_count):
        found += [[]] * piece.begins
        found[-1] = found[-1] + piece.content.tolist()
    return found


@pytest.mark.parametrize("piece", [1 << 20, 1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_has_the_same_documents(tmp_path, name, piece, monkeypatch):
    monkeypatch.setattr("mhmoe_np.data.token_files.PIECE", piece)
    WRITERS[name](tmp_path / "a.bin")
    assert documents_of(tmp_path / "a.bin") == DOCUMENTS


@pytest.mark.parametrize("name", WRITERS)
def test_a_store_of_them_holds_the_same_ids_and_the_held_out_text(tmp_path, tokenizer, name):
    WRITERS[name](tmp_path / "a.bin")
    settings = PreparationSettings(vocab_size=500, validation_fraction=0.2)
    sources = find_sources([str(tmp_path / "a.bin")])
    prepare_store(tmp_path / "store", sources, settings, tokenizer=tokenizer, workers=1)
    (stream,) = open_streams(tmp_path / "store", tokenizer_sha256=tokenizer_sha256(tokenizer))
    token_W = stream.take(np.arange(len(stream))).tolist()
    held_out = (tmp_path / "store" / "validation" / "a.jsonl").read_text()
    without = [[other for other in DOCUMENTS if other is not one] for one in DOCUMENTS]
    (lost,) = [one for one, rest in zip(DOCUMENTS, without, strict=True) if _joined(rest) == token_W]
    assert json.loads(held_out)["text"] == tokenizer.decode(lost)
    assert read_header(tmp_path / "store").domains[0].documents == 3


def _joined(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [END, *document]][1:]


def test_a_tokenizer_must_be_given(tmp_path):
    nanogpt(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin: holds tokens; name the tokenizer that they are of"):
        prepare_store(
            tmp_path / "store",
            find_sources([str(tmp_path / "a.bin")]),
            PreparationSettings(vocab_size=500),
            tokenizer=None,
            workers=1,
        )
    assert not (tmp_path / "store").exists()


def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path):
    nanogpt(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin: token 7 is id 10, and the tokenizer has 10 ids"):
        documents_of(tmp_path / "a.bin", id_count=10)


def resized(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def with_another_version(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] = 9
    path.write_bytes(content)


def with_a_torn_index(path: Path) -> None:
    resized(path.with_suffix(".idx"))


def with_an_odd_index(path: Path) -> None:
    path.with_suffix(".idx").write_bytes(b"something else")


def with_documents_in_disorder(path: Path) -> None:
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[-8:] = struct.pack("<q", 2)
    index.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("nanogpt", resized, r"a\.bin: has 27 bytes of ids of 2 bytes each, not a whole number"),
        ("llm.c gpt-2", resized, r"a\.bin: has 27 bytes of ids of 2 bytes each, not 14 ids"),
        ("llm.c gpt-2", with_another_version, r"a\.bin: is an llm\.c file of version 9"),
        ("megatron int32", resized, r"a\.bin: has 43 bytes of ids of 4 bytes each, not 11 ids"),
        ("megatron int32", with_a_torn_index, r"a\.idx: has 145 bytes, not 146"),
        ("megatron int32", with_an_odd_index, r"a\.idx: is no index of Megatron's"),
        ("megatron int32", with_documents_in_disorder, r"a\.idx: its documents are not in order"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, damage, message):
    WRITERS[name](tmp_path / "a.bin")
    damage(tmp_path / "a.bin")
    with pytest.raises(UserError, match=message):
        documents_of(tmp_path / "a.bin")
