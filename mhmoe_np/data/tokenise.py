"""Texts to ids in memory: a domain's stream, a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.data.encoder import DTYPES, Encoder, dtype_name, encode_batch
from mhmoe_np.data.pieces import PIECE, place_to_cut
from mhmoe_np.data.tokenizer import end_of_text_id
from mhmoe_np.types import IntArray


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
    dtype = DTYPES[dtype_name(tokenizer)]
    separator = np.array([end_of_text_id(tokenizer)], dtype=dtype)
    parts = [part for piece in pieces for part in (separator, piece)]
    return np.concatenate([np.empty(0, dtype=dtype), *parts[1:]])


def tokenise_each(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[IntArray]:
    """Encode documents, one after the other; see `tokenise`.

    Yields token_W of each, uint16 where every id fits and else uint32.

    Raises UserError: the tokenizer cannot encode the text.
    """
    encoder = Encoder(tokenizer)
    for document in documents:
        yield encoder.array(b"".join(encoder.encode(_parts(document))))


def _parts(document: str) -> list[str]:
    parts = []
    while len(document) > PIECE:
        place = place_to_cut(document)
        parts.append(document[:place])
        document = document[place:]
    return [*parts, document]


def tokenise_prompt(prompt: str, tokenizer: Tokenizer) -> IntArray:
    """Encode the beginning of a text, with the special tokens that the tokenizer's file puts there.

    Many a tokenizer begins a text with a token of its own, as transformers does with the same
    `tokenizer.json`; those trained here add none. What a signal's handler raises ends it.

    Returns token_T, int64.

    Raises UserError: the tokenizer cannot encode the text.
    """
    (encoding,) = encode_batch(tokenizer, [prompt], add_special_tokens=True)
    return np.array(encoding.ids, dtype=np.int64)
