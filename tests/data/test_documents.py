import json
import re
from pathlib import Path

import pytest

from mhmoe_np.data.sources import domain_names
from mhmoe_np.data.tokenised_text import tokenise_text
from mhmoe_np.errors import UserError
from tests.documents import embedded_documents, read_documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_three_or_more_newlines_separate_the_documents_of_a_text_file(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\nstill one\n\n\ntwo\n\n\n\n\nthree\n")
    assert read_documents(path).documents == ("one\n\nstill one", "two", "three\n")


def test_windows_line_ends_separate_documents_too(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\nline\r\n\r\n\r\ntwo")
    assert read_documents(path).documents == ("one\r\nline", "two")


def test_blank_documents_are_dropped(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n\none\n\n\n \t\n\n\ntwo\n\n\n")
    assert read_documents(path).documents == ("one", "two")


def test_a_text_file_is_counted_whole_with_its_separators(tmp_path):
    text = "naïve café\n\n\n\ntwo words\n"
    found = read_documents(write(tmp_path / "a.txt", text))
    assert found.counts.bytes == len(text.encode()) == len(text) + 2
    assert found.counts.words == 4


def test_each_line_of_a_json_lines_file_is_one_document_and_only_its_text_counts(tmp_path):
    texts = ["one\n\n\nstill one", "línea \u2028 two", " "]
    lines = [json.dumps({"id": 7, "text": text}, ensure_ascii=False) for text in texts]
    found = read_documents(write(tmp_path / "a.jsonl", "\r\n".join([*lines, "", ""])))
    assert found.documents == tuple(texts[:2])
    assert found.counts.bytes == sum(len(text.encode()) for text in texts)
    assert found.counts.words == 5


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "b.txt", "3")
    write(tmp_path / "a" / "z.jsonl", '{"text": "2"}')
    write(tmp_path / "a" / "b" / "c.TXT", "1")
    write(tmp_path / "README.md", "not text")
    found = read_documents(tmp_path)
    assert found.documents == ("1", "2", "3")
    assert (found.counts.bytes, found.counts.words) == (3, 3)


def test_a_pattern_reads_every_file_it_matches_once(tmp_path):
    write(tmp_path / "a" / "b" / "2.txt", "two")
    write(tmp_path / "a" / "1.txt", "one")
    write(tmp_path / "c.jsonl", '{"text": "three"}')
    assert read_documents(tmp_path / "a" / "*.txt").documents == ("one",)
    assert read_documents(tmp_path / "**" / "**" / "*.txt").documents == ("one", "two")


def test_a_file_whose_name_looks_like_a_pattern_is_read_as_that_file(tmp_path):
    path = write(tmp_path / "a[1].txt", "one")
    assert read_documents(path).documents == ("one",)
    assert domain_names([str(path)]) == ["a[1]"]


def test_one_blank_file_among_others_is_no_fault(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "text")
    assert read_documents(tmp_path).documents == ("text",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", "a.txt: is not UTF-8 at byte offset 3"),
        ("a.txt", "é".encode()[:1], "a.txt: is not UTF-8 at byte offset 0"),
        ("a.jsonl", b'{"text": "\xc3"}', "a.jsonl: is not UTF-8 at byte offset 10"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl:2: is not JSON"),
        ("a.jsonl", '\n{"text": "a"}\nplain', "a.jsonl:3: is not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: is not JSON"),
        ("a.jsonl", "1" * 5_000, "a.jsonl:1: is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"content": "a"}', 'a.jsonl:2: has no string "text"'),
        ("a.jsonl", '{"text": ["a"]}', 'a.jsonl:1: has no string "text"'),
        ("a.jsonl", '"text"', 'a.jsonl:1: has no string "text"'),
        ("a.jsonl", r'{"text": "a\ud800"}', 'a.jsonl:1: "text" holds half a surrogate pair'),
        ("a.jsonl", '{"text": " "}', "a.jsonl: has no document with text in it"),
        ("a.txt", "\n\n\n \n", "a.txt: has no document with text in it"),
        ("a.txt", "", "a.txt: has no document with text in it"),
        ("a.md", "text", "a.md: is none of .txt, .jsonl"),
        ("a", "text", "a: is none of .txt, .jsonl"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_place(
    tmp_path, tokenizer, name, content, message
):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        tokenise_text("a", path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", "none.txt: no such file or folder"),
        ("none/*.txt", "none/*.txt: matches no file"),
        ("folder*", "folder*: matches no file"),
        ("folder", "folder: has no .txt, .jsonl or .parquet file in it"),
        ("folder/*", "a.md: is none of .txt, .jsonl"),
    ],
)
def test_a_path_without_text_is_refused_by_name(tmp_path, path, message):
    write(tmp_path / "folder" / "a.md", "text")
    with pytest.raises(UserError, match=re.escape(message)):
        read_documents(tmp_path / path)


def test_an_unreadable_file_is_refused_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        read_documents(path)


def test_domains_are_named_by_their_stems(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "here" / "v1.2" / "a.txt", "text").parent.parent)
    assert domain_names(["v1.2/a.txt", "v1.2", "v1.2/*.txt", "*.txt", ".", "v1.2/**/*.jsonl"]) == [
        "a",
        "v1.2",
        "v1.2-2",
        "here",
        "here-2",
        "v1.2-3",
    ]


def test_equal_stems_get_distinct_names():
    names = domain_names(["a.txt", "x/a.txt", "y/a.jsonl", "a-2.txt", "a-2-2.txt"])
    assert names == ["a", "a-2", "a-3", "a-2-2", "a-2-2-2"]


def test_the_embedded_corpus_is_three_domains_of_equal_size():
    assert {
        name: (len(found.documents), found.counts.bytes, found.counts.words)
        for name, found in embedded_documents().items()
    } == {
        "books": (68, 639_685, 111_757),
        "speech": (15, 636_596, 105_878),
        "lexicon": (826, 639_996, 101_229),
    }
