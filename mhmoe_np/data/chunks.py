"""Chunks: so many pieces of documents as are encoded at a time, and their ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.encoder import Encoder
from mhmoe_np.data.pieces import PIECE, Piece
from mhmoe_np.data.tokenizer import end_of_text_id

Chunk = list[Piece]


class EncodedChunk(NamedTuple):
    """A chunk's ids.

    Attributes:
        ids: as the bytes of an array, an end of text before each document that begins here.
        starts: where each of those documents begins, behind its end of text: int64, in ids.
    """

    ids: bytes
    starts: list[int]


def in_chunks(pieces: Iterable[Piece]) -> Iterator[Chunk]:
    """Pieces in lists of about `PIECE` characters; they depend on the pieces alone."""
    chunk: Chunk = []
    size = 0
    for piece in pieces:
        if chunk and size + len(piece.content) > PIECE:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += len(piece.content)
    if chunk:
        yield chunk


class ChunkEncoder:
    """Encodes chunks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` comes from `train_tokenizer` or `load_tokenizer`.

        Raises UserError: it has no end of text.
        """
        self._encoder = Encoder(tokenizer)
        end = np.array([end_of_text_id(tokenizer)], dtype=self._encoder.dtype)
        self._end_of_text = end.tobytes()

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """The chunk's ids.

        Raises UserError: the tokenizer cannot encode its text.
        """
        width, dtype = self._encoder.dtype.itemsize, self._encoder.dtype
        texts = [piece.content for piece in chunk if isinstance(piece.content, str)]
        encoded = iter(self._encoder.encode(texts))
        parts, starts, length = [], [], 0
        for piece in chunk:
            if piece.begins:
                parts.append(self._end_of_text)
                length += width
                starts.append(length // width)
            if isinstance(piece.content, str):
                ids = next(encoded)
            else:
                ids = piece.content.astype(dtype).tobytes()
            parts.append(ids)
            length += len(ids)
        return EncodedChunk(b"".join(parts), starts)
