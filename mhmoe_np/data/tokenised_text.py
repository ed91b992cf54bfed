"""A text as the stream of its tokens, on disk, so that memory does not grow with it."""

from __future__ import annotations

import hashlib
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.chunks import Chunk, ChunkEncoder, EncodedChunk, in_chunks
from mhmoe_np.data.encoder import DTYPES, LEAST_ID_BYTES, dtype_name
from mhmoe_np.data.pieces import Piece
from mhmoe_np.data.read_file import TEXT_KEY, TextCounts, pieces_of_texts, read_pieces
from mhmoe_np.data.sources import Source, find_files
from mhmoe_np.errors import UserError
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.storage.disk import check_disk
from mhmoe_np.storage.memory import size_text
from mhmoe_np.types import IntArray

WHITE_SPACE_RUN = re.compile(r"\s+")


@dataclass(frozen=True)
class TokenisedText:
    """A named text's tokens, and what it was.

    Attributes:
        token_W: the stream of its documents' tokens with an end of text between neighbours; uint16
            where every id fits and else uint32, read-only, mapped from a file that has no name.
        tokens_of_documents: int64 [documents]; none is blank.
        largest_id: of the stream.
        byte_count, word_count: bytes of UTF-8, and runs of characters other than white space, of the
            original: of a whole `.txt` file with its separators, of others the texts alone.
        document_bytes: bytes of UTF-8 of the documents.
        split_words: of the documents, as lm-evaluation-harness counts them: an empty word before and
            after white space at the ends counts.
        corpus_sha256: a hash of the documents, whatever files hold them: the sha256 of each document's
            sha256 (32 bytes, of its UTF-8), one behind the other.
    """

    name: str
    token_W: IntArray
    tokens_of_documents: IntArray
    largest_id: int
    byte_count: int
    word_count: int
    document_bytes: int
    split_words: int
    corpus_sha256: str


def tokenise_text(
    name: str,
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = TEXT_KEY,
    on_progress: OnProgress = unseen,
) -> TokenisedText:
    """Read and encode a file, all files below a folder, or those that a glob pattern matches.

    `read_pieces` says which files those are, and what a document is in each. Files are read in the
    order of their paths; blank documents are dropped.

    text_key: where the text stands in a line of JSON, or the column of a table.
    on_progress: is told how many bytes of the files are read.

    Raises UserError: nothing is there, a file is of another kind, is damaged, is not UTF-8 or has a bad
    line, there is no document, the tokenizer cannot encode the text, or the disk cannot hold the
    tokens; OSError: it is full.
    """
    source = Source(name, tuple(find_files(path)))
    check_disk(
        Path(tempfile.gettempdir()),
        int(LEAST_ID_BYTES * source.size),
        f"{path}: the tokens of {size_text(source.size)} of text need",
        remedy="name a folder with room in TMPDIR, or give less text",
    )
    counts = TextCounts()
    read = counting(on_progress, f"tokenising {name}", source.size)
    pieces = (
        piece
        for file in source.files
        for piece in read_pieces(file, text_key=text_key, counts=counts, on_bytes=read)
    )
    return _tokenised(name, str(path), pieces, counts, tokenizer)


def tokenise_documents(name: str, documents: Sequence[str], tokenizer: Tokenizer) -> TokenisedText:
    """Encode documents that are at hand; blank ones are dropped.

    Raises UserError: there is no document, or the tokenizer cannot encode the text.
    """
    counts = TextCounts()
    return _tokenised(name, name, pieces_of_texts(documents, counts), counts, tokenizer)


def _tokenised(
    name: str, place: str, pieces: Iterable[Piece], counts: TextCounts, tokenizer: Tokenizer
) -> TokenisedText:
    corpus = _Corpus()

    def chunks() -> Iterator[Chunk]:
        for chunk in in_chunks(pieces):
            for piece in chunk:
                corpus.add(piece)
            yield chunk

    encoder, dtype = ChunkEncoder(tokenizer), DTYPES[dtype_name(tokenizer)]
    token_W, start_of_document = _on_disk(map(encoder.encode, chunks()), dtype)
    if not len(start_of_document):
        raise UserError(f"{place}: has no document with text in it; add some text")
    # An end of text stands behind each document but the last.
    ends = np.append(start_of_document[1:] - 1, len(token_W))
    return TokenisedText(
        name=name,
        token_W=token_W,
        tokens_of_documents=ends - start_of_document,
        largest_id=int(token_W.max(initial=0)),
        byte_count=counts.bytes,
        word_count=counts.words,
        document_bytes=corpus.bytes,
        split_words=corpus.split_words,
        corpus_sha256=corpus.sha256(),
    )


def _on_disk(chunks: Iterable[EncodedChunk], dtype: np.dtype[Any]) -> tuple[IntArray, IntArray]:
    """The stream of chunks without the end of text before the first document, and where each begins."""
    starts, written = array("q"), 0
    try:
        with tempfile.TemporaryFile() as file:
            for ids, begins in chunks:
                starts.extend(written + begin - 1 for begin in begins)
                file.write(ids)
                written += len(ids) // dtype.itemsize
            file.flush()
            mapped = np.memmap(file, dtype=dtype, mode="r") if written else np.empty(1, dtype)
    except OSError as error:
        error.filename = tempfile.gettempdir()
        raise
    return np.asarray(mapped)[1:], np.frombuffer(starts, dtype=np.int64)


class _Corpus:
    """Counts and hashes documents as their pieces come."""

    def __init__(self) -> None:
        self.bytes = self.split_words = 0
        self._whole, self._document = hashlib.sha256(), hashlib.sha256()
        self._inside, self._ends_in_space = False, False

    def add(self, piece: Piece) -> None:
        assert isinstance(piece.content, str)
        encoded = piece.content.encode()
        runs = len(WHITE_SPACE_RUN.findall(piece.content))
        if piece.begins:
            self._end_document()
            self._inside = True
            self.split_words += 1
        elif self._ends_in_space and piece.content[0].isspace():
            runs -= 1  # it goes on
        self._ends_in_space = piece.content[-1].isspace()
        self.split_words += runs
        self.bytes += len(encoded)
        self._document.update(encoded)

    def _end_document(self) -> None:
        if self._inside:
            self._whole.update(self._document.digest())
        self._document = hashlib.sha256()
        self._inside = False

    def sha256(self) -> str:
        """Of all; there comes no more."""
        self._end_document()
        return self._whole.hexdigest()
