"""Reading one file of text as a stream of documents, in memory that does not grow with the file.

`.txt`: documents are separated by three or more newlines. `.jsonl`: a line is `{"text": ...}`. Both may
be compressed with gzip or Zstandard. `.parquet`: a column of strings. A byte order mark is passed over.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeAlias

from mhmoe_np.data.pieces import PIECE, Piece, place_to_cut
from mhmoe_np.data.sources import PARQUET, is_token_file, text_suffix
from mhmoe_np.errors import UserError
from mhmoe_np.storage.reading import check_regular, reason_of

BLOCK = 1 << 20  # bytes read at once
LONGEST_LINE = 1 << 30  # bytes of a line of JSON
# Bytes of a `.zst` file that are decompressed at once: one can become thirty thousand. So few are taken
# at first, and no more as long as much comes out.
FEWEST_COMPRESSED, MOST_COMPRESSED = 32, 4096
ROWS = 1024  # of a table, read at once
# Three line ends or more. What the first of them begins with, where that is \r, is cut off
# afterwards: a pattern that may begin in two ways is searched for some thirty times as slowly.
SEPARATOR = re.compile(r"\n(?:\r?\n){2,}")
TEXT_KEY = "text"

OnBytes = Callable[[int], object]
Bytes: TypeAlias = IO[bytes] | gzip.GzipFile


class TextCounts:
    """Bytes and words of text as it stood in files; see `read_pieces`."""

    def __init__(self) -> None:
        """Start from zero."""
        self.bytes = self.words = 0
        self._inside_a_word = False

    def add(self, text: str, *, new: bool) -> None:
        """Count some text; new: no word of it began in the text before."""
        self.bytes += len(text.encode())
        self.words += len(text.split())
        if text:
            if not new and self._inside_a_word and not text[0].isspace():
                self.words -= 1
            self._inside_a_word = not text[-1].isspace()


def read_pieces(
    file: Path,
    *,
    text_key: str = TEXT_KEY,
    counts: TextCounts | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[Piece]:
    """The documents of a file, without blank ones; a long one comes in pieces.

    text_key: where the text stands in a line of JSON, or the column of a table.
    counts: gets the bytes of UTF-8 and the words of the original: of a text file with its separators,
    of the others the texts alone.
    on_bytes: is told how many more bytes of the file were read.

    Raises UserError: the file cannot be read or is damaged, is not UTF-8, has a bad line, or holds
    tokens.
    """
    if is_token_file(file):
        raise UserError(f"{file}: holds tokens; give a file of text")
    if text_suffix(file) == PARQUET:
        texts = _table_texts(file, text_key, on_bytes)
    else:
        with ExitStack() as stack:
            try:
                raw = stack.enter_context(file.open("rb"))
                stream = _decompressed(file, raw)
                report = _Report(raw, on_bytes)
                if text_suffix(file) == ".txt":
                    yield from _text_pieces(_text_blocks(file, stream, report, counts))
                    return
                yield from pieces_of_texts(_json_texts(file, stream, text_key, report), counts)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{file}: damaged gzip file: {error}; take another copy") from None
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {reason_of(error)}; check the file") from None
        return
    yield from pieces_of_texts(texts, counts)


class _Report:
    """Tells how far a file was read."""

    def __init__(self, raw: IO[bytes], on_bytes: OnBytes | None) -> None:
        self._raw, self._on_bytes, self._told = raw, on_bytes, 0

    def tell(self) -> None:
        """Report what was read since the last time."""
        if self._on_bytes is not None:
            place = self._raw.tell()
            self._on_bytes(place - self._told)
            self._told = place


def _decompressed(file: Path, raw: IO[bytes]) -> Bytes:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(file, raw), BLOCK)
    return raw


class _Zstandard(io.RawIOBase):
    """What a `.zst` file holds, frame after frame. The library's own reader passes over a torn end."""

    def __init__(self, file: Path, raw: IO[bytes]) -> None:
        import zstandard

        self._file, self._raw = file, raw
        self._error = zstandard.ZstdError
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._at_once = FEWEST_COMPRESSED

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            found = (self._frame.unused_data if self._ended() else b"") or self._raw.read(self._at_once)
            if not found:
                if self._frame is not None and not self._frame.eof:
                    raise UserError(f"{self._file}: damaged zst file: it ends early; take another copy")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._context.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(found))
            except self._error as error:
                raise UserError(f"{self._file}: damaged zst file: {error}; take another copy") from None
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _ended(self) -> bool:
        return self._frame is not None and self._frame.eof


def _decode(file: Path, data: bytes, *, offset: int, final: bool) -> tuple[str, int]:
    """Text of the whole characters in `data`, which begins at `offset`, and their bytes."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 at byte offset {offset + error.start}; convert it to UTF-8"
        ) from None


def _text_blocks(
    file: Path, stream: Bytes, report: _Report, counts: TextCounts | None
) -> Iterator[str]:
    pending, offset = b"", 0
    while True:
        block = stream.read(BLOCK)
        text, used = _decode(file, pending + block, offset=offset, final=not block)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        pending, offset = (pending + block)[used:], offset + used
        report.tell()
        if counts is not None:
            counts.add(text, new=offset == used)
        yield text
        if not block:
            return


def _text_pieces(blocks: Iterator[str]) -> Iterator[Piece]:
    buffer, begins = "", True
    for block in blocks:
        # A separator may go on in the next block.
        buffer += block
        held = buffer[len(buffer.rstrip("\r\n")) :] if block else ""
        if len(held) > 7 and SEPARATOR.fullmatch(held.removeprefix("\r")):
            buffer = buffer[: len(buffer) - len(held)]
            buffer, held = buffer + "\n\n\n", "\n\n\n"  # as good as a thousand
        elif len(held) > PIECE:
            held = ""
        *whole, unfinished = SEPARATOR.split(buffer[: len(buffer) - len(held)])
        for document in whole:
            yield from _cut(document.removesuffix("\r"), begins=begins)
            begins = True
        while len(unfinished) > PIECE:
            place = place_to_cut(unfinished)
            if not begins or unfinished[:place].strip():
                yield Piece(unfinished[:place], begins)
                begins = False
            unfinished = unfinished[place:]
        buffer = unfinished + held
    yield from _cut(buffer, begins=begins)


def _cut(text: str, *, begins: bool) -> Iterator[Piece]:
    """The rest of a document, or a whole one, which is dropped where it is blank."""
    if begins and not text.strip():
        return
    while len(text) > PIECE:
        place = place_to_cut(text)
        yield Piece(text[:place], begins)
        text, begins = text[place:], False
    if text:
        yield Piece(text, begins)


def _json_texts(file: Path, stream: Bytes, text_key: str, report: _Report) -> Iterator[str]:
    # Not splitlines: a JSON string may hold U+2028 and the like as they are.
    offset, number = 0, 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        place = f"{file}:{number}"
        if len(line) == LONGEST_LINE:
            raise UserError(f"{place}: has {LONGEST_LINE:,} bytes or more; cut it into shorter texts")
        text, _ = _decode(file, line, offset=offset, final=True)
        if number == 1:
            text = text.removeprefix("\ufeff")
        offset += len(line)
        if text.strip():
            yield _json_text(text, text_key, place=place)
        if number % 256 == 0:
            report.tell()
    report.tell()


def _json_text(line: str, text_key: str, *, place: str) -> str:
    wanted = f'write {{"{text_key}": "..."}}'
    if text_key != TEXT_KEY:
        wanted += " or name another key with --text-key"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not JSON: {reason_of(error)}; {wanted}") from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: has no string "{text_key}"; {wanted}')
    return _encodable(text, text_key, place=place)


def _encodable(text: str, text_key: str, *, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{place}: "{text_key}" holds half a surrogate pair (\\ud800 to \\udfff); remove it'
        ) from None
    return text


def _table_texts(file: Path, text_key: str, on_bytes: OnBytes | None) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(
            f"{file}: reading .parquet needs pyarrow; pip install 'mhmoe-np[parquet]'"
        ) from None
    size, row = check_regular(file).st_size, 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                known = ", ".join(repr(name) for name in names[:8])
                raise UserError(
                    f"{file}: has no column {text_key!r}, only {known}; name one with --text-key"
                )
            rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{file}: row {row} has no string {text_key!r}; remove it")
                    yield text
                if on_bytes is not None:
                    on_bytes(size * row // rows - size * (row - len(batch)) // rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a readable .parquet file: {reason}; take another copy") from None


def pieces_of_texts(texts: Iterable[str], counts: TextCounts | None) -> Iterator[Piece]:
    """Documents, without blank ones; a long one comes in pieces. `counts` as of `read_pieces`."""
    for text in texts:
        if counts is not None:
            counts.add(text, new=True)
        yield from _cut(text, begins=True)
