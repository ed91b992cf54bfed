"""The token store of runs that older releases began: one file of ids and a JSON sidecar, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from mhmoe_np.data.encoder import DTYPES
from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import (
    Count,
    Positive,
    PositiveCount,
    StrictModel,
    first_fault,
    shown,
)
from mhmoe_np.storage.reading import read_json
from mhmoe_np.types import IntArray


class OldHeader(StrictModel):
    """The keys of the sidecar. `bytes` and `words` are of the documents, without what separates.

    A sidecar of version 1 has `document_offsets` as well; it is read without them.
    """

    version: Literal[2]
    name: str
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    vocab_size: Positive
    documents: PositiveCount
    tokens: PositiveCount
    bytes: Count
    words: Count


def open_old_store(path: Path, *, tokenizer_sha256: str) -> IntArray:
    """Map the ids of `<path>.bin` into memory, read-only: token_W.

    Raises UserError: a file is missing, unreadable or of the wrong size, or the store is of another
    version or was made with another tokenizer than that of hash `tokenizer_sha256`.
    """
    sidecar, token_path = (path.with_name(f"{path.name}.{end}") for end in ("json", "bin"))
    header = _read_header(sidecar)
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(f"{sidecar}: was made with another tokenizer; tokenise the text again")
    dtype = DTYPES[header.dtype]
    try:
        size = token_path.stat().st_size
        if size != header.tokens * dtype.itemsize:
            raise UserError(
                f"{token_path}: has {size} bytes, not {header.tokens * dtype.itemsize}; "
                "tokenise the text again"
            )
        return np.memmap(token_path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(
            f"{token_path}: cannot be read: {error.strerror}; tokenise the text again"
        ) from None


def _read_header(path: Path) -> OldHeader:
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; tokenise the text again") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version not in (1, 2):
        raise UserError(
            f"{path}: is not a token store of version 1 or 2 (got {shown(version)}); "
            "tokenise the text again"
        )
    if version == 1:
        values = {key: value for key, value in values.items() if key != "document_offsets"}
        values["version"] = 2
    try:
        return OldHeader.model_validate(values)
    except ValidationError as error:
        reason = first_fault(error, OldHeader.model_fields)
        raise UserError(f"{path}: {reason}; tokenise the text again") from None
