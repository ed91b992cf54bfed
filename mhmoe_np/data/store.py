"""The token store: a flat file of token ids, mapped into memory, and a JSON sidecar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from tokenizers import Encoding, Tokenizer

from mhmoe_np.data.interruptible import interruptible
from mhmoe_np.data.tokenizer import end_of_text_id, id_count, tokenizer_sha256
from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import (
    Count,
    Positive,
    PositiveCount,
    StrictModel,
    first_fault,
    shown,
)
from mhmoe_np.storage import files
from mhmoe_np.storage.reading import read_json
from mhmoe_np.types import IntArray

VERSION: Literal[2] = 2
# The byte order is part of the format.
DTYPES: dict[str, np.dtype[np.unsignedinteger[Any]]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
# The library's encodings take some hundred bytes per token; this bounds those alive at a time (a
# longer document is a chunk of its own).
CHARACTERS_PER_CHUNK = 4_000_000


class StoreHeader(StrictModel):
    """The keys of the sidecar. `bytes` and `words` are of the documents, without what separates.

    A sidecar of version 1 has `document_offsets` as well; it is read without them.
    """

    version: Literal[2] = VERSION
    name: str
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    vocab_size: Positive
    documents: PositiveCount
    tokens: PositiveCount
    bytes: Count
    words: Count


@dataclass(frozen=True)
class TokenStore:
    """An open store: the sidecar, and the read-only stream of token ids."""

    header: StoreHeader
    token_W: IntArray


def tokenise(documents: Sequence[str], tokenizer: Tokenizer) -> IntArray:
    """Encode documents into one stream with an end of text between neighbours.

    `tokenizer` comes from `train_tokenizer` or `load_tokenizer`. What a signal's handler raises ends
    it, as in `interruptible`.

    Returns token_W, uint16 where every id fits and else uint32.

    Raises UserError: the tokenizer has no end of text or cannot encode the text.
    """
    return joined(list(tokenise_each(documents, tokenizer)), tokenizer)


def joined(pieces: Sequence[IntArray], tokenizer: Tokenizer) -> IntArray:
    """One stream of documents' tokens, with an end of text between neighbours.

    Shapes and types as `tokenise`.

    Raises UserError: the tokenizer has no end of text.
    """
    dtype = DTYPES[_dtype_name(tokenizer)]
    separator = np.array([end_of_text_id(tokenizer)], dtype=dtype)
    parts = [part for piece in pieces for part in (separator, piece)]
    return np.concatenate([np.empty(0, dtype=dtype), *parts[1:]])


def tokenise_each(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[IntArray]:
    """Encode documents, one after the other; see `tokenise`.

    Yields token_W of each, uint16 where every id fits and else uint32.

    Raises UserError: the tokenizer cannot encode the text.
    """
    dtype = DTYPES[_dtype_name(tokenizer)]
    for chunk in _chunks(documents):
        for encoding in _encode(chunk, tokenizer, add_special_tokens=False):
            yield np.array(encoding, dtype=dtype)


def tokenise_prompt(prompt: str, tokenizer: Tokenizer) -> IntArray:
    """Encode the beginning of a text, with the special tokens that the tokenizer's file puts there.

    Many a tokenizer begins a text with a token of its own, as transformers does with the same
    `tokenizer.json`; those trained here add none. What a signal's handler raises ends it.

    Returns token_T, int64.

    Raises UserError: the tokenizer cannot encode the text.
    """
    (ids,) = _encode([prompt], tokenizer, add_special_tokens=True)
    return np.array(ids, dtype=np.int64)


def write_store(path: Path, documents: Sequence[str], tokenizer: Tokenizer, *, name: str) -> TokenStore:
    """Tokenise `documents` into `<path>.bin` and `<path>.json`, and open them.

    The folder must exist; an older store at `path` is replaced. The sidecar goes first and comes
    last: an interruption leaves no sidecar rather than one beside another's tokens.

    Raises UserError: there is nothing to store, or as `tokenise`.
    """
    token_W = tokenise(documents, tokenizer)
    if not len(token_W):
        raise UserError(f"{name}: has no token to store; add some text")
    header = StoreHeader(
        name=name,
        dtype=_dtype_name(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=id_count(tokenizer),
        documents=len(documents),
        tokens=len(token_W),
        bytes=sum(len(document.encode()) for document in documents),
        words=sum(len(document.split()) for document in documents),
    )
    sidecar_path = _sidecar_path(path)
    sidecar_path.unlink(missing_ok=True)
    files.write_atomically(_token_path(path), lambda temporary: temporary.write_bytes(token_W.data))
    files.write_atomically(
        sidecar_path, lambda temporary: files.write_json(temporary, header.model_dump())
    )
    return open_store(path, tokenizer_sha256=header.tokenizer_sha256)


def open_store(path: Path, *, tokenizer_sha256: str) -> TokenStore:
    """Map the store at `path` into memory, read-only.

    Raises UserError: a file is missing, unreadable or of the wrong size, or the store is of another
    version or was made with another tokenizer than that of hash `tokenizer_sha256`.
    """
    header = _read_header(_sidecar_path(path))
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{_sidecar_path(path)}: was made with another tokenizer; tokenise the text again"
        )
    token_path = _token_path(path)
    dtype = DTYPES[header.dtype]
    try:
        size = token_path.stat().st_size
        if size != header.tokens * dtype.itemsize:
            raise UserError(
                f"{token_path}: has {size} bytes, not {header.tokens * dtype.itemsize}; "
                "tokenise the text again"
            )
        return TokenStore(header, np.memmap(token_path, dtype=dtype, mode="r"))
    except OSError as error:
        raise _unreadable(token_path, error) from None


def _dtype_name(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if id_count(tokenizer) <= 1 << 16 else "uint32"


def _chunks(documents: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    length = 0
    for document in documents:
        if chunk and length + len(document) > CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, length = [], 0
        chunk.append(document)
        length += len(document)
    yield chunk


def _encode(
    documents: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Iterator[list[int]]:
    def encode() -> list[Encoding]:
        # The refusal is made here, not around the wait: what a handler raises is no fault of the text.
        try:
            return tokenizer.encode_batch_fast(documents, add_special_tokens=add_special_tokens)
        except Exception as error:  # The library raises nothing narrower.
            raise UserError(
                f"tokenizer: cannot encode the text: {error}; use a byte-level tokenizer"
            ) from None

    for encoding in interruptible(encode):
        yield encoding.ids


def _token_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.bin")


def _sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_header(path: Path) -> StoreHeader:
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; tokenise the text again") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version not in (1, VERSION):
        raise UserError(
            f"{path}: is not a token store of version 1 or {VERSION} (got {shown(version)}); "
            "tokenise the text again"
        )
    if version == 1:
        values = {key: value for key, value in values.items() if key != "document_offsets"}
        values["version"] = VERSION
    try:
        return StoreHeader.model_validate(values)
    except ValidationError as error:
        reason = first_fault(error, StoreHeader.model_fields)
        raise UserError(f"{path}: {reason}; tokenise the text again") from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror}; tokenise the text again")
