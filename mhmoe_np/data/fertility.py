"""How well a tokenizer fits a text: how many tokens it takes for it."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer

from mhmoe_np.data.encoder import Encoder
from mhmoe_np.data.read_file import TEXT_KEY, OnBytes, TextCounts, read_pieces
from mhmoe_np.data.sources import Source


class Fertility(NamedTuple):
    """A text's counts: tokens without ends of text, words, bytes of UTF-8."""

    tokens: int
    words: int
    bytes: int

    @property
    def tokens_per_word(self) -> float:
        """The usual measure of fertility; the lower, the shorter a text is in tokens."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for."""
        return self.bytes / max(1, self.tokens)


def fertility(
    tokenizer: Tokenizer,
    source: Source,
    *,
    text_key: str = TEXT_KEY,
    on_bytes: OnBytes | None = None,
) -> Fertility:
    """Encode a domain and count.

    on_bytes: is told how many more bytes of the files were read.

    Raises UserError: the text is unfit, or the tokenizer cannot encode it.
    """
    encoder, counts, size = Encoder(tokenizer), TextCounts(), 0
    for file in source.files:
        for piece in read_pieces(file, text_key=text_key, counts=counts, on_bytes=on_bytes):
            assert isinstance(piece.content, str)
            size += len(encoder.encode([piece.content])[0])
    return Fertility(size // encoder.dtype.itemsize, counts.words, counts.bytes)
