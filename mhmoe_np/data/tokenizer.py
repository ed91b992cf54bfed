"""The byte-level BPE tokenizer: training, saving, loading.

GPT-2's byte-level BPE, by the `tokenizers` library. Departs in two points: the name of a
special token inside a document is encoded as ordinary text, so no document can end another; and
of the tokenizers trained here no token is longer than a bound [D13].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mhmoe_np.data.interruptible import interruptible
from mhmoe_np.errors import UserError
from mhmoe_np.storage import files
from mhmoe_np.storage.reading import read_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
DEFAULT_VOCAB_SIZE = 32768
MINIMUM_VOCAB_SIZE = 257  # the 256 bytes and the end of text
# Characters of one kind - letters, digits, white space, others - that may join into one token. Training
# takes time with the square of a run's length. Above every run of the embedded corpus (73) and every
# line that programs are written in.
LONGEST_RUN = 128
# GPT-2's, with a bound where it has `+`. A space before a word is not counted.
_RUN = f"{{1,{LONGEST_RUN}}}"
TRAINED_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    rf"| ?\p{{L}}{_RUN}| ?\p{{N}}{_RUN}| ?[^\s\p{{L}}\p{{N}}]{_RUN}|\s{_RUN}(?!\S)|\s{_RUN}"
)
"""How the tokenizers trained here cut a text before its pairs are merged."""

# The library's threads do not survive a fork: the child warns, or hangs with the value "true". One
# thread tokenises about a megabyte a second. The user's own setting stands.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train a lossless byte-level BPE; the end of text has id 0, further special tokens 1 and so on.

    The same documents in the same order give the same tokenizer: GPT-2's, where no run of letters,
    digits, white space or other characters is longer than 128; a longer one is cut. Its vocabulary
    is smaller than `vocab_size` where the text has no more pairs to merge.

    `documents` are read in another thread. A signal's handler runs meanwhile, and what it raises
    ends the training, as in `interruptible`.

    Raises UserError: `vocab_size` is below 257 and the further special tokens, or one of these is
    empty or twice there.
    """
    names = [END_OF_TEXT, *special_tokens]
    for name in names:
        if not name or names.count(name) > 1:
            raise UserError(f"special token {name!r}: must have a name of its own; choose another")
    least = MINIMUM_VOCAB_SIZE + len(special_tokens)
    if vocab_size < least:
        more = "" if not special_tokens else f", as do {len(special_tokens)} more special tokens"
        raise UserError(
            f"vocab_size: {vocab_size} is below {least}, "
            f"which the bytes and the end of text need{more}; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINED_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    interruptible(lambda: tokenizer.train_from_iterator(documents, trainer))
    return _prepared(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, ours or another's; its truncation and padding are switched off.

    Raises UserError: the file is missing, cannot be read or holds no tokenizer.
    """
    text = read_text(Path(path))
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: holds no tokenizer: {reason}; give a tokenizer.json") from None
    return _prepared(tokenizer)


def check_saves(tokenizer: Tokenizer, source: str) -> None:
    """Make sure that a tokenizer is the same one when it is written and read again.

    The library reads files whose own copy of them it then refuses: a merge of tokens that the
    vocabulary lacks, for one.

    Raises UserError: it is not; the line names `source`.
    """
    try:
        same = tokenizer_sha256(Tokenizer.from_str(tokenizer.to_str())) == tokenizer_sha256(tokenizer)
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(
            f"{source}: cannot be written and read again: {' '.join(str(error).split())}; "
            "give another tokenizer.json"
        ) from None
    if not same:
        raise UserError(
            f"{source}: is not the same when it is written and read again; give another tokenizer.json"
        )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a `tokenizer.json`; its folder must exist."""
    files.write_text(path, tokenizer.to_str(pretty=True) + "\n")


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Find the token that separates documents.

    Raises UserError: the vocabulary has none of the usual ones.
    """
    for name in END_OF_TEXT_NAMES:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise UserError(
        f"tokenizer: its vocabulary has no end of text; add one of {', '.join(END_OF_TEXT_NAMES)}"
    )


def has_end_of_text(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has one of the usual tokens that separate documents."""
    return any(tokenizer.token_to_id(name) is not None for name in END_OF_TEXT_NAMES)


def id_count(tokenizer: Tokenizer) -> int:
    """Count the ids a model of this tokenizer needs: one more than the highest, holes included.

    Raises UserError: there is none.
    """
    ids = tokenizer.get_vocab().values()
    if not ids:
        raise UserError("tokenizer: has an empty vocabulary; give a trained tokenizer.json")
    return 1 + max(ids)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Name -> id of the special tokens, in the order of their ids."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in sorted(added.items()) if token.special}


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash everything that the tokenizer does, as 64 hexadecimal digits."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _prepared(tokenizer: Tokenizer) -> Tokenizer:
    # Not part of tokenizer.json: must be set anew on every tokenizer.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
