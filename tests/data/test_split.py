import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.data.pieces import Piece
from mhmoe_np.data.sources import EMBEDDED_NAMES
from mhmoe_np.data.split import split_by_size, split_pieces
from mhmoe_np.errors import UserError
from tests.documents import embedded_documents

fractions = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 2**64)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def split_documents(documents, *, fraction, seed):
    """The documents for training, and those held out."""
    sizes = np.array([len(document.encode()) for document in documents])
    split = split_by_size(sizes, fraction=fraction, seed=seed)
    found = list(split_pieces((Piece(document, True) for document in documents), split))
    assert all(piece.begins for piece, _ in found)
    return tuple(
        tuple(piece.content for piece, is_held_out in found if is_held_out is wanted)
        for wanted in (False, True)
    )


def byte_count(documents):
    return sum(len(document.encode()) for document in documents)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(document in rest for document in part)


@given(documents=st.lists(texts, min_size=2), fraction=fractions, seed=seeds)
def test_every_document_lands_in_one_part_in_its_order(documents, fraction, seed):
    training, validation = split_documents(documents, fraction=fraction, seed=seed)
    assert sorted(training + validation) == sorted(documents)
    assert is_subsequence(training, documents)
    assert is_subsequence(validation, documents)


@given(documents=st.lists(texts, min_size=2), fraction=fractions.filter(lambda x: x > 0), seed=seeds)
def test_validation_stays_within_its_share_or_is_the_shortest_document(documents, fraction, seed):
    training, validation = split_documents(documents, fraction=fraction, seed=seed)
    assert training
    assert validation
    room = fraction * byte_count(documents)
    shortest = min(byte_count([document]) for document in documents)
    assert byte_count(validation) <= max(room, shortest)
    # No document was left out that would have fitted.
    assert all(byte_count([*validation, document]) > room for document in training)


@given(document=texts, fraction=fractions, seed=seeds)
def test_a_lone_document_is_cut_in_two_and_nothing_is_lost(document, fraction, seed):
    training, validation = split_documents([document], fraction=fraction, seed=seed)
    assert "".join(training + validation) == document
    assert len(training) == 1
    assert len(validation) == (1 if fraction > 0 and len(document) > 1 else 0)
    assert all(training + validation)


def test_the_split_depends_on_the_seed_alone():
    documents = embedded_documents()["lexicon"].documents
    first = split_documents(documents, fraction=0.05, seed=1)
    assert split_documents(list(documents), fraction=0.05, seed=1) == first
    assert split_documents(documents, fraction=0.05, seed=2) != first


def test_the_split_of_a_seed_never_changes():
    documents = [str(number) for number in range(10)]
    assert split_documents(documents, fraction=0.3, seed=0)[1] == ("2", "4", "6")


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_the_embedded_domains_give_about_the_share_asked_for(name):
    documents = embedded_documents()[name].documents
    _, validation = split_documents(documents, fraction=0.05, seed=0)
    assert 0.03 <= byte_count(validation) / byte_count(documents) <= 0.05


@pytest.mark.parametrize(
    ("document", "validation"),
    [
        ("aaaa aaaa\naaaa aaaa\naaaa aaaa\naaaa aaaa\naaaa aa", "aaaa aa"),
        ("aaaa aaaa aaaa aaaa aaaa aaaa aaaa aaaa", "aaaa aaaa"),
        ("a" * 40, "a" * 8),
        # The nearer of two line ends, before or after the share asked for.
        ("a" * 71 + "\n" + "a" * 9 + "\n" + "a" * 18, "a" * 18),
        ("a" * 77 + "\n" + "a" * 9 + "\n" + "a" * 12, "a" * 9 + "\n" + "a" * 12),
        # A line end far from the share asked for is passed over.
        ("title\n" + "a" * 94, "a" * 20),
        # Bytes count, not characters, and no character is torn.
        ("a" * 40 + "語" * 20, "語" * 7),
    ],
)
def test_a_lone_document_is_cut_at_a_line_end_else_a_space_else_anywhere(document, validation):
    assert split_documents([document], fraction=0.2, seed=0)[1] == (validation,)


def test_fraction_zero_validates_on_nothing():
    for documents in (["a"], ["a", "b"]):
        assert split_documents(documents, fraction=0, seed=0) == (tuple(documents), ())


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_leaves_no_training_text_is_refused(fraction):
    with pytest.raises(UserError, match=r"validation fraction: .* is not in \[0, 1\)"):
        split_documents(["a", "b"], fraction=fraction, seed=0)


@given(
    pieces=st.lists(st.text("aé \n", min_size=2, max_size=12), min_size=2, max_size=8),
    fraction=st.floats(0.01, 0.99),
)
def test_a_lone_document_in_pieces_is_cut_about_where_the_whole_would_be(pieces, fraction):
    whole = "".join(pieces)
    size = len(whole.encode())
    split = split_by_size(np.array([size]), fraction=fraction, seed=0)
    parts = [Piece(text, number == 0) for number, text in enumerate(pieces)]
    found = list(split_pieces(iter(parts), split))
    assert "".join(piece.content for piece, _ in found) == whole
    flags = [is_held_out for _, is_held_out in found]
    assert flags == sorted(flags)
    assert [piece.begins for piece, _ in found].count(True) == 2
    assert found[0][0].begins
    assert found[flags.index(True)][0].begins
    held_out = sum(len(piece.content.encode()) for piece, held_out in found if held_out)
    # A piece of at most 12 characters, 24 bytes, holds the place.
    assert abs(held_out - fraction * size) <= 24
