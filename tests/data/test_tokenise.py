import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mhmoe_np.data import ascii_words, known_ids, pieces
from mhmoe_np.data import encoder as encoder_module
from mhmoe_np.data import tokenise as module
from mhmoe_np.data.ascii_words import AsciiWords
from mhmoe_np.data.encoder import Cut, Encoder, cut_of
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenizer import LONGEST_RUN, train_tokenizer
from mhmoe_np.errors import UserError
from tests.documents import embedded_documents


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


def test_a_long_document_has_the_tokens_of_the_whole(documents, tokenizer, monkeypatch):
    whole = "\n".join(documents)
    expected = tokenizer.encode(whole).ids
    assert tokenise([whole], tokenizer).tolist() == expected
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(pieces, "TAIL", 100)
    assert tokenise([whole], tokenizer).tolist() == expected


WORDS = st.sampled_from(
    [
        *("a", "the", "don't", "we'll", "é", "語", "\u0308", "\x1c", "<|endoftext|>", "7", "1234"),
        *(".", "...", ",", "'", "-", "_", "=", "\u200b", "\ufeff", "\ud7ff", "a" * (LONGEST_RUN + 2)),
        *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x85", "\xa0", "\u2028", "\u3000", "\u180e"),
        *(" " * (LONGEST_RUN + 1), "\n" * LONGEST_RUN),
    ]
)


@settings(deadline=None)
@given(
    st.one_of(
        st.lists(WORDS, max_size=12).map("".join),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    )
)
def test_looking_up_gives_the_librarys_ids(tokenizer, text):
    encoder = Encoder(tokenizer)
    (once,), (again,) = encoder.encode([text]), encoder.encode([text])
    assert encoder.array(once).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert again == once


@settings(deadline=None)
@given(st.lists(WORDS, max_size=12).map("".join))
def test_looking_up_gives_the_ids_of_gpt_2s_cut_too(gpt_2_like, text):
    encoder = Encoder(gpt_2_like)
    assert cut_of(gpt_2_like) is not None
    assert encoder.array(encoder.encode([text])[0]).tolist() == gpt_2_like.encode(text).ids


ASCII = st.text(st.characters(max_codepoint=127), max_size=40)


@settings(deadline=None)
@given(ASCII | st.lists(WORDS.filter(str.isascii), max_size=12).map("".join))
def test_ascii_is_cut_into_the_words_that_the_library_cuts(tokenizer, gpt_2_like, text):
    for cut in (tokenizer, gpt_2_like):
        words = cut_of(cut).ascii_words
        pieces = cut.pre_tokenizer.pre_tokenize_str(text)
        assert [text[first:last] for _, (first, last) in pieces] == words.findall(text)
        assert (
            AsciiWords(cut, words, width=2).ids(text) == np.array(cut.encode(text).ids, "<u2").tobytes()
        )


def test_words_that_are_remembered_are_forgotten_without_a_mark(documents, tokenizer, monkeypatch):
    monkeypatch.setattr(ascii_words, "MOST_WORDS", 20)
    forgetful = AsciiWords(tokenizer, cut_of(tokenizer).ascii_words, width=4)
    texts = [text for text in documents if text.isascii()]
    for text in texts:
        assert np.frombuffer(forgetful.ids(text), "<u4").tolist() == tokenizer.encode(text).ids
    assert len(forgetful._known) < len(set(" ".join(texts).split())) / 2
    monkeypatch.setattr(known_ids, "MOST_CHARACTERS", 5)
    assert [len(forgetful.ids(text)) for text in ("abcdef", "abcdef")] == [
        4 * len(tokenizer.encode("abcdef").ids)
    ] * 2
    assert len(forgetful._known) == 1


def with_digits_apart(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def test_a_tokenizer_with_a_further_cut_is_asked_for_whole_segments(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    with_digits_apart(other)
    assert cut_of(other) == Cut(None)
    text = "In 1851 it's 12 %, or so2."
    assert tokenise([text], other).tolist() == other.encode(text).ids


def test_a_model_that_cannot_encode_ascii_is_refused(tokenizer):
    parts = json.loads(tokenizer.to_str())
    del parts["model"]["vocab"]["z"]
    parts["model"]["unk_token"] = "gone"
    parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if "z" not in "".join(pair)]
    with pytest.raises(
        UserError, match="tokenizer: cannot encode the text: Unk token `gone` not found"
    ):
        tokenise(["a maze"], Tokenizer.from_str(json.dumps(parts)))


@pytest.fixture(scope="module")
def gpt_2_like(tokenizer) -> Tokenizer:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.encode_special_tokens = True
    return other


def test_what_is_remembered_is_bounded_and_forgotten_without_a_mark(documents, tokenizer, monkeypatch):
    documents = [f"é {text}" for text in documents]  # ASCII alone takes another way
    expected = [Encoder(tokenizer).encode([text])[0] for text in documents]
    monkeypatch.setattr(encoder_module, "MOST_SEGMENTS", 50)
    forgetful = Encoder(tokenizer)
    assert [forgetful.encode([text])[0] for text in documents] == expected
    assert len(forgetful._known) < sum(len(text.split()) for text in documents) / 4


def prefixed(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def normalised(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(" ", "_")


def otherwise_cut(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+ \w+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def with_a_token_of_two_words(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens(["the whale"])


@pytest.mark.parametrize("change", [prefixed, normalised, otherwise_cut, with_a_token_of_two_words])
def test_tokenizers_of_other_kinds_are_left_to_the_library(tokenizer, change):
    other = Tokenizer.from_str(tokenizer.to_str())
    change(other)
    assert cut_of(other) is None
    text = "I saw the whale  and the ship."
    assert tokenise([text], other).tolist() == other.encode(text).ids


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_dtype_is_the_narrowest_that_holds_every_id(size, dtype):
    tokenizer = word_level(size)
    token_W = tokenise(["last", "last"], tokenizer)
    assert token_W.dtype == dtype
    assert token_W.tolist() == [size - 1, 0, size - 1]


def test_a_megabyte_in_one_document_takes_seconds(documents):
    texts = [text for found in embedded_documents().values() for text in found.documents]
    text = "\n".join(texts)[:1_000_000]
    tokenizer = train_tokenizer(documents, vocab_size=2000)
    started = time.perf_counter()
    for document in (text, "a" * 1_000_000):
        tokenise([document], tokenizer)
    assert time.perf_counter() - started < 10


def test_a_text_the_tokenizer_cannot_encode_is_refused():
    with pytest.raises(UserError, match=r"tokenizer: cannot encode the text: .*; use a byte-level"):
        tokenise(["unknown"], word_level(10))
