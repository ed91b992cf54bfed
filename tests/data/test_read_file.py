"""Files of every form give the same documents, whatever the blocks that they are read in."""

import gzip
import json
import re
import sys
import tracemalloc

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mhmoe_np.data import pieces, read_file
from mhmoe_np.data.pieces import WHITE_SPACE, place_to_cut
from mhmoe_np.data.read_file import TextCounts, read_pieces
from mhmoe_np.data.sources import find_files, find_sources
from mhmoe_np.errors import UserError
from tests.documents import read_documents

TEXTS = ["one\n\nstill one", "zwei Wörter", "三", "\u2028 four\n"]
LINES = "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in TEXTS)


def documents_of(path, **options) -> list[str]:
    """Joined from their pieces."""
    found: list[str] = []
    for piece in read_pieces(path, **options):
        found += [""] * piece.begins
        found[-1] += piece.content
    return found


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content[:20]) + gzip.compress(content[20:])
    if name.endswith(".zst"):
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(content[:20]) + compressor.compress(content[20:])
    return content


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.zst", "a.txt", "a.txt.gz", "a.txt.zst"]
)
def test_compression_and_a_byte_order_mark_change_nothing(tmp_path, name, mark):
    content = LINES if "json" in name.lower() else "\n\n\n".join(TEXTS)
    path = tmp_path / name
    path.write_bytes(compressed(name, mark + content.encode()))
    assert documents_of(path) == TEXTS
    found = read_documents(tmp_path)
    assert found.documents == tuple(TEXTS)
    original = "".join(TEXTS) if "json" in name.lower() else content
    assert found.counts.bytes == len(original.encode())
    assert find_sources([str(path)])[0].name == "a"


def test_a_column_of_a_table_is_read(tmp_path):
    table = pyarrow.table({"content": TEXTS, "text": ["x"] * len(TEXTS)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    told = []
    found = documents_of(tmp_path / "a.parquet", text_key="content", on_bytes=told.append)
    assert found == TEXTS
    assert sum(told) == (tmp_path / "a.parquet").stat().st_size
    assert read_documents(tmp_path).documents == ("x",) * len(TEXTS)


def test_another_key_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": 7}\n')
    assert documents_of(tmp_path / "a.jsonl", text_key="body") == ["one"]
    with pytest.raises(UserError, match=r'a\.jsonl:1: has no string "bodi"; .* --text-key'):
        documents_of(tmp_path / "a.jsonl", text_key="bodi")


def torn(content: bytes) -> bytes:
    return content[:-5]


def flipped(content: bytes) -> bytes:
    middle = len(content) - 9
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [torn, flipped])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    else:
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        path.write_bytes(compressor.compress(LINES.encode()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*take another copy") as caught:
        documents_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["x"]}, "has no column 'text', only 'content'; name one with --text-key"),
        ({"text": ["x", None]}, "row 2 has no string 'text'"),
        ({"text": [1, 2]}, "row 1 has no string 'text'"),
    ],
)
def test_a_table_without_text_is_refused(tmp_path, columns, message):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=re.escape(message)):
        documents_of(tmp_path / "a.parquet")


def test_a_table_without_its_library_is_refused_with_the_command_that_installs_it(
    tmp_path, monkeypatch
):
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'mhmoe-np\[parquet\]'"):
        documents_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.txt", "a few words and a line\n"),
        ("a.txt.gz", "no end of it, and no line "),
        ("a.txt.zst", "a few words and a line\n"),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, name, line, monkeypatch):
    """With blocks and pieces a sixteenth as long as usual, so that a small file is large enough."""
    monkeypatch.setattr(read_file, "BLOCK", 1 << 16)
    for module in (read_file, pieces):
        monkeypatch.setattr(module, "PIECE", 1 << 16)
    monkeypatch.setattr(pieces, "TAIL", 1 << 12)
    size = 8_000_000
    path = tmp_path / name
    path.write_bytes(compressed(name, (line * (size // len(line))).encode()))
    tracemalloc.start()
    length = sum(piece.size for piece in read_pieces(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length == size // len(line) * len(line)
    assert peak < size / 4


SOME = st.lists(st.sampled_from(["a", "é", "語", " ", "\n", "\r\n", "\r", "\n\n\n", "bc"]), max_size=40)


def plain_documents(text: str) -> list[str]:
    return [part for part in re.split(r"(?:\r?\n){3,}", text) if part.strip()]


@settings(deadline=None)
@given(parts=SOME, block=st.integers(1, 7))
def test_blocks_leave_no_mark_on_the_documents(tmp_path_factory, parts, block):
    text = "".join(parts)
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read_file, "BLOCK", block)
        counts, told = TextCounts(), []
        assert documents_of(path, counts=counts, on_bytes=told.append) == plain_documents(text)
    assert (counts.bytes, counts.words) == (len(text.encode()), len(text.split()))
    assert sum(told) == len(text.encode())


@settings(deadline=None)
@given(parts=SOME, block=st.integers(1, 7))
def test_a_long_document_comes_in_pieces_that_make_it_up(tmp_path_factory, parts, block):
    text = "x" + "".join(parts).replace("\n", "\t").replace("\r", "\t") + "x"
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        for module in (read_file, pieces):
            patched.setattr(module, "PIECE", 5)
        patched.setattr(pieces, "TAIL", 4)
        patched.setattr(read_file, "BLOCK", block)
        found = list(read_pieces(path))
    assert "".join(piece.content for piece in found) == text
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert all(0 < len(piece.content) <= 5 for piece in found)


def test_a_piece_ends_at_a_lines_end_else_at_a_space_else_anywhere(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 12)
    monkeypatch.setattr(pieces, "TAIL", 8)
    assert place_to_cut("aaa aaa\naa aaaaaaa") == 7
    assert place_to_cut("aaa aaa aa aaaaaaa") == 10
    assert place_to_cut("aaaaaaaaaaaaaaaaaa") == 12
    # Never within white space: the tokens there belong together.
    assert place_to_cut("aaaaaaaa   \n   aaa") == 8


def test_python_and_unicode_agree_on_white_space_but_for_four_characters():
    found = re.compile(f"[{WHITE_SPACE}]")
    differ = [n for n in range(0x110000) if bool(found.match(chr(n))) != chr(n).isspace()]
    assert differ == [0x1C, 0x1D, 0x1E, 0x1F]


def test_a_file_of_tokens_is_no_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0" * 8)
    assert find_files(tmp_path / "a.bin") == [tmp_path / "a.bin"]
    with pytest.raises(UserError, match=r"a\.bin: holds tokens; give a file of text"):
        read_documents(tmp_path / "a.bin")
