import json
import os
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenizer import (
    END_OF_TEXT,
    LONGEST_RUN,
    check_saves,
    end_of_text_id,
    id_count,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from mhmoe_np.errors import UserError
from tests.documents import embedded_documents

GPT_2_CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)
WHITE_SPACE = " \n\t\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u3000"
# One character over and over, or a few of a kind by turns, about the bound and far past it.
runs = st.builds(
    lambda unit, length: (unit * length)[:length],
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3),
        st.text(st.sampled_from(WHITE_SPACE), min_size=1, max_size=3),
        st.sampled_from(["a", "的", "é", "7", "٣", "!", "'", "'s", "e\u0301", "\u0301", "\0", " x"]),
    ),
    st.one_of(st.integers(0, 3), st.integers(LONGEST_RUN - 2, LONGEST_RUN + 3), st.integers(0, 1000)),
)


def run_python(code: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout


def test_the_vocabulary_is_the_end_of_text_the_bytes_and_merges(tokenizer):
    assert id_count(tokenizer) == tokenizer.get_vocab_size() == 500
    assert tokenizer.id_to_token(0) == END_OF_TEXT
    assert id_count(train_tokenizer([], vocab_size=257)) == 257


def test_training_is_the_same_in_every_process():
    code = (
        "from tests.documents import embedded_documents\n"
        "from mhmoe_np.data.tokenizer import train_tokenizer\n"
        "found = embedded_documents().values()\n"
        "documents = [text for each in found for text in each.documents[:10]]\n"
        "print(train_tokenizer(documents, vocab_size=1000).to_str())"
    )
    serial = run_python(code, PYTHONHASHSEED="1")
    parallel = run_python(code, PYTHONHASHSEED="2", TOKENIZERS_PARALLELISM="true")
    assert serial == parallel
    assert len(json.loads(serial)["model"]["vocab"]) == 1000


def test_no_thread_is_left_and_a_fork_after_encoding_neither_warns_nor_hangs():
    code = (
        "import os, psutil, time\n"
        "from mhmoe_np.data.tokenise import tokenise\n"
        "from mhmoe_np.data.tokenizer import train_tokenizer\n"
        "documents = ['some text'] * 100\n"
        "threads = psutil.Process().num_threads()\n"
        "tokenizer = train_tokenizer(documents, vocab_size=257)\n"
        "tokenise(documents, tokenizer)\n"
        # Python counts a thread as ended a few microseconds before the system does.
        "deadline = time.monotonic() + 10\n"
        "while psutil.Process().num_threads() > threads: assert time.monotonic() < deadline\n"
        "child = os.fork()\n"
        "tokenise(documents, tokenizer)\n"
        "if child: print(os.waitpid(child, 0)[1])"
    )
    assert run_python(code) == "0\n"


@settings(deadline=None)
@example("")
@example("  two spaces at both ends  ")
@example("\x00\x01\x7f\r\n\t\x85\u2028\ufeff\ufffd")
@example("👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ ")
@example(f"a{END_OF_TEXT}b {END_OF_TEXT} {END_OF_TEXT}")
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
    token_W = tokenise([text], tokenizer)
    assert tokenizer.decode(token_W.tolist(), skip_special_tokens=False) == text
    assert end_of_text_id(tokenizer) not in token_W


def trained_on(documents: list[str], vocab_size: int, cut: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def test_the_embedded_corpus_gives_the_vocabulary_merges_and_ids_of_gpt_2s_cut():
    documents = [text for found in embedded_documents().values() for text in found.documents]
    plain = trained_on(documents, 4096, GPT_2_CUT)
    tokenizer = train_tokenizer(documents, vocab_size=4096)
    assert json.loads(tokenizer.to_str())["model"] == json.loads(plain.to_str())["model"]
    pairs = zip(tokenizer.encode_batch_fast(documents), plain.encode_batch_fast(documents), strict=True)
    assert all(ours.ids == theirs.ids for ours, theirs in pairs)


@settings(deadline=None)
@example(["a" * 128, "'s", " " * 129, "a"])
@example([" " + "a" * 127, " ", "\n" * 127, "a"])
@given(st.lists(runs, max_size=6))
def test_pieces_are_gpt_2s_where_all_of_those_are_within_the_bound(tokenizer, texts):
    text = "".join(texts)
    ours = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert all(end - start <= 1 + LONGEST_RUN for _, (start, end) in ours)
    assert "".join(text[start:end] for _, (start, end) in ours) == text
    theirs = GPT_2_CUT.pre_tokenize_str(text)
    if all(end - start <= LONGEST_RUN for _, (start, end) in theirs):
        assert ours == theirs


@settings(deadline=None)
@given(st.lists(runs, max_size=6))
def test_long_runs_survive_encoding_and_decoding(tokenizer, texts):
    text = "".join(texts)
    token_W = tokenise([text], tokenizer)
    assert tokenizer.decode(token_W.tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize("unit", ["ACGT", "的一是", "a", "!", "1", " ", "\n", "\0", "e\u0301", "👩"])
def test_text_without_spaces_gives_no_token_longer_than_the_bound(unit):
    text = unit * (100_000 // len(unit))
    tokenizer = train_tokenizer([text], vocab_size=400)
    token_W = tokenise([text], tokenizer)
    assert tokenizer.decode(token_W.tolist(), skip_special_tokens=False) == text
    longest = max(len(tokenizer.decode([token])) for token in set(token_W.tolist()))
    assert longest <= 1 + LONGEST_RUN


def test_text_full_of_the_end_of_text_does_not_merge_into_it():
    documents = [f"{END_OF_TEXT}{END_OF_TEXT} {END_OF_TEXT}"] * 50
    tokenizer = train_tokenizer(documents, vocab_size=400)
    assert 0 not in tokenise(documents[:1], tokenizer)


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert loaded.to_str() == tokenizer.to_str()
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert list(tmp_path.iterdir()) == [path]
    text = f"kept {END_OF_TEXT} apart"
    assert (tokenise([text], loaded) == tokenise([text], tokenizer)).all()


def test_different_tokenizers_have_different_hashes(documents, tokenizer):
    other = train_tokenizer(documents, vocab_size=499)
    assert len(tokenizer_sha256(other)) == 64
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off(tokenizer, tmp_path):
    foreign = Tokenizer.from_str(tokenizer.to_str())
    foreign.enable_truncation(max_length=2)
    foreign.enable_padding(length=50)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    token_W = tokenise(["some longer text"], loaded)
    assert (token_W == tokenise(["some longer text"], tokenizer)).all()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff", b"not\njson", b'{"version": "1.0", "model": {}}']
)
def test_a_file_that_holds_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: (holds|cannot|is not UTF-8)") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size):
    with pytest.raises(UserError, match=f"vocab_size: {vocab_size} is below 257"):
        train_tokenizer(["text"], vocab_size=vocab_size)


@pytest.mark.parametrize("name", [END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"])
def test_the_usual_names_of_the_end_of_text_are_found(name):
    foreign = Tokenizer(models.WordLevel({"text": 0, name: 1}))
    assert end_of_text_id(foreign) == 1


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(UserError, match=r"no end of text; add one of <\|endoftext\|>, </s>"):
        end_of_text_id(Tokenizer(models.WordLevel({"text": 0})))


def test_ids_are_counted_to_the_highest_one_past_any_hole(tokenizer):
    holed = Tokenizer(models.WordLevel({"text": 0, "</s>": 9}))
    assert holed.get_vocab_size() == 2
    assert id_count(holed) == 10
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_special_tokens([AddedToken("<|user|>")])
    assert id_count(extended) == 501


def test_a_tokenizer_that_is_not_the_same_when_written_and_read_is_refused(tokenizer, tmp_path):
    check_saves(tokenizer, "good.json")
    values = json.loads(tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    merged = max(vocabulary, key=vocabulary.get)
    # Two tokens of one id: the library reads them, and writes one of them.
    vocabulary[merged] = vocabulary["a"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    loaded = load_tokenizer(path)
    with pytest.raises(UserError, match=r"bad\.json: cannot be written and read again: Token"):
        check_saves(loaded, "bad.json")
