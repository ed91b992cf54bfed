"""A tokenizer from a sample of a text of any size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from mhmoe_np.data.read_file import TEXT_KEY, read_pieces
from mhmoe_np.data.sources import Source
from mhmoe_np.data.tokenizer import MINIMUM_VOCAB_SIZE, load_tokenizer, train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.progress import OnProgress, counting, unseen

SAMPLE_BYTES = 1 << 24  # of text, that a tokenizer is trained on
LEAST_SLICE = 1 << 12  # characters that are sampled in one place


class Sample:
    """Texts from all over a text, of `SAMPLE_BYTES` together, or all of it."""

    def __init__(self, size: int) -> None:
        """Sample a text of `size` bytes."""
        self._rate = SAMPLE_BYTES / max(size, SAMPLE_BYTES)
        self._owed = 0.0
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Take some of the next part of the text, or nothing."""
        if self._rate == 1:
            self.texts.append(text)
            return
        self._owed += self._rate * len(text)
        if self._owed >= min(len(text), LEAST_SLICE):
            taken = text[: int(self._owed)]
            self.texts.append(taken)
            self._owed -= len(taken)


def train_on_sample(
    texts: Sequence[str], *, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """`train_tokenizer`, whose vocabulary is no larger than the text allows.

    That of the embedded corpus with the default settings comes with the package: it is not trained.

    Raises UserError: as `train_tokenizer`.
    """
    trained = trained_already(texts, vocab_size, special_tokens)
    if trained.is_file():
        return load_tokenizer(trained)
    # No text has more pairs to merge than bytes, and the library makes room for what it is told.
    most = MINIMUM_VOCAB_SIZE + len(special_tokens) + sum(len(text.encode()) for text in texts)
    return train_tokenizer(texts, vocab_size=min(vocab_size, most), special_tokens=special_tokens)


def trained_already(texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str]) -> Path:
    """Where the tokenizer of these texts and settings is in the package, if it is there.

    Its name is a digest of them all: it can be no other's.
    """
    settings = json.dumps([vocab_size, *special_tokens, [len(text) for text in texts]])
    digest = hashlib.sha256(settings.encode())
    for text in texts:
        digest.update(text.encode())
    corpus = resources.files("mhmoe_np.data.corpus")
    return Path(str(corpus / f"tokenizer-{digest.hexdigest()[:16]}.json"))


def train_on_sources(
    sources: Sequence[Source],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    text_key: str = TEXT_KEY,
    on_progress: OnProgress = unseen,
) -> Tokenizer:
    """Train a tokenizer on files of text, or on a sample of `SAMPLE_BYTES` where they have more.

    special_tokens: names beside the end of text's; ids 1, 2 and so on.
    on_progress: is told what is being done, and how many bytes of how many.

    Raises UserError: the text is unfit, or `vocab_size` is too small.
    """
    total, size = sum(source.size for source in sources), 0
    files = [file for source in sources for file in source.files]
    report = counting(on_progress, "reading", total)
    for file in files:
        pieces = read_pieces(file, text_key=text_key, on_bytes=report)
        size += sum(piece.size for piece in pieces)
    sample, report = Sample(size), counting(on_progress, "sampling", total)
    for file in files:
        for piece in read_pieces(file, text_key=text_key, on_bytes=report):
            assert isinstance(piece.content, str)
            sample.add(piece.content)
    if not sample.texts:
        raise UserError(f"{files[0]}: has no document with text in it; add some text")
    on_progress("training the tokenizer", 0, 0)
    return train_on_sample(sample.texts, vocab_size=vocab_size, special_tokens=special_tokens)
