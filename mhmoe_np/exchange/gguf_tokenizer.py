"""A byte-level BPE tokenizer in the keys of a GGUF file, and from them.

The file has tokens, merges and kinds of tokens; how text is cut into words before it has only by name
(`tokenizer.ggml.pre`). What the names mean is in llama.cpp's source and in the `tokenizer.json` of the
models that they are named after. SentencePiece tokenizers are refused: the order of their merges is not
in the file.

Source   llama.cpp's `src/llama-vocab.cpp`, `llm_tokenizer_bpe`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from mhmoe_np.data.tokenizer import (
    MINIMUM_VOCAB_SIZE,
    check_saves,
    end_of_text_id,
    id_count,
    load_tokenizer,
    train_tokenizer,
)
from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import shown

PREFIX = "tokenizer.ggml."
BYTE_LEVEL_BPE = "gpt2"
NO_TOKENIZER = ("no_vocab", "none")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN_2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# One after the other, each cutting what those before it left.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")


class Cut(NamedTuple):
    """What `tokenizer.ggml.pre` stands for."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a word that is a token is taken whole
    adds_begin: bool = False  # where `add_bos_token` is absent


def _by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _digits_apart() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


CUTS = {
    "gpt-2": Cut(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": Cut(_digits_apart()),
    "llama-bpe": Cut(_by(LLAMA_3), ignore_merges=True, adds_begin=True),
    "qwen2": Cut(_by(QWEN_2), normalizers.NFC()),
    "default": Cut(_by(*DEFAULT)),
}


def import_tokenizer(values: dict[str, Any], path: Path, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of the GGUF file at `path`; None: it says that it has none.

    A `tokenizer.json` in the same folder is taken instead of what the file has.

    Raises UserError: it is no byte-level BPE, or is cut in a way not known here; a key is missing or
    damaged; or it knows ids that the model lacks.
    """
    beside = path.with_name("tokenizer.json")
    if beside.is_file():
        tokenizer = load_tokenizer(beside)
        if id_count(tokenizer) > vocab_size:
            raise UserError(
                f"{beside}: knows {id_count(tokenizer):,} ids, the model in {path.name} "
                f"{vocab_size:,}; put the model's own there, or none"
            )
        return tokenizer
    kind = values.get(f"{PREFIX}model", NO_TOKENIZER[0])
    if kind in NO_TOKENIZER:
        return None
    remedy = "put the model's tokenizer.json beside the file"
    if kind != BYTE_LEVEL_BPE:
        raise UserError(
            f"{path}: key '{PREFIX}model' is {shown(kind)}; only byte-level BPE ('{BYTE_LEVEL_BPE}') "
            f"is read from the file: {remedy}"
        )
    cut = CUTS.get(pre) if isinstance(pre := values.get(f"{PREFIX}pre"), str) else None
    if cut is None:
        raise UserError(
            f"{path}: key '{PREFIX}pre' is {shown(pre)}; only {', '.join(CUTS)} are known: {remedy}"
        )
    return _tokenizer(values, cut, path, vocab_size)


def end_of_text_ids(values: dict[str, Any], path: Path, *, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, a turn or a message, as the file says.

    Raises UserError: one is no id of the model.
    """
    keys = [PREFIX + name for name in ENDS if PREFIX + name in values]
    return tuple(dict.fromkeys(_id(values, key, path, vocab_size) for key in keys))  # each once


def _id(values: dict[str, Any], key: str, path: Path, vocab_size: int) -> int:
    value = values[key]
    if type(value) is not int or not 0 <= value < vocab_size:
        raise UserError(
            f"{path}: key {key!r} is {shown(value)}; must be a token id, 0 .. {vocab_size - 1}"
        )
    return value


def _tokenizer(values: dict[str, Any], cut: Cut, path: Path, vocab_size: int) -> Tokenizer:
    tokens = _strings(values, f"{PREFIX}tokens", path)
    if len(tokens) != vocab_size:
        raise UserError(
            f"{path}: key '{PREFIX}tokens' has {len(tokens):,} tokens, the model {vocab_size:,}"
        )
    pairs = [merge.partition(" ") for merge in _strings(values, f"{PREFIX}merges", path)]
    kinds = values.get(f"{PREFIX}token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(f"{path}: key '{PREFIX}token_type' must have a kind for each token")
    # Tokens that are not used fill the vocabulary up; nothing of a text may become one.
    known = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    merges = [(left, right) for left, _, right in pairs]
    try:
        tokenizer = Tokenizer(models.BPE(known, merges, ignore_merges=cut.ignore_merges))
    except Exception as error:  # The library raises nothing narrower.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: key '{PREFIX}merges' does not fit the tokens: {reason}") from None
    tokenizer.pre_tokenizer, tokenizer.decoder = cut.pre_tokenizer, decoders.ByteLevel()
    if cut.normalizer is not None:
        tokenizer.normalizer = cut.normalizer
    tokenizer.add_special_tokens(_added(tokens, kinds, CONTROL))
    tokenizer.add_tokens(_added(tokens, kinds, USER_DEFINED))
    begin = _added_id(values, "bos", path, vocab_size, default=cut.adds_begin)
    end = _added_id(values, "eos", path, vocab_size, default=False)
    if begin or end:
        names = [[tokens[i] for i in ids] for ids in (begin, end)]
        tokenizer.post_processor = TemplateProcessing(
            single=[*names[0], "$A", *names[1]],
            special_tokens=[(tokens[i], i) for i in dict.fromkeys(begin + end)],
        )
    tokenizer.encode_special_tokens = True  # as `load_tokenizer` has it
    check_saves(tokenizer, f"{path}: its tokenizer")
    return tokenizer


def _added_id(
    values: dict[str, Any], which: str, path: Path, vocab_size: int, *, default: bool
) -> list[int]:
    """The token, if any, that stands at one end of each text."""
    key = f"{PREFIX}{which}_token_id"
    if not values.get(f"{PREFIX}add_{which}_token", default):
        return []
    if key not in values:
        raise UserError(f"{path}: lacks key {key!r}, a token that is added to each text")
    return [_id(values, key, path, vocab_size)]


def _strings(values: dict[str, Any], key: str, path: Path) -> list[str]:
    found = values.get(key)
    if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
        raise UserError(f"{path}: lacks key {key!r}, a list of strings; convert the model again")
    return found


def _added(tokens: list[str], kinds: list[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, own in zip(tokens, kinds, strict=True)
        if own == kind
    ]


def export_tokenizer(
    tokenizer: Tokenizer, end_of_text: tuple[int, ...], *, vocab_size: int
) -> dict[str, Any]:
    """The keys that describe a tokenizer, as a file of a model with `vocab_size` tokens has them.

    end_of_text: the ids that end a text, the first one its own, any others a turn's and a message's;
    none: the tokenizer's end of text.

    A tokenizer trained here is written as "gpt-2", which it is but for runs of more than 128 characters
    of one kind: it cuts them [D13].

    Raises UserError: a GGUF file has no words for it, it knows more ids than the model, or more than
    three of them end a text.
    """
    saved = json.loads(tokenizer.to_str())
    model = saved["model"]
    whole = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if (
        model["type"] != "BPE"
        or any(model[key] for key in whole)
        or _type(saved["decoder"]) != "ByteLevel"
    ):
        raise UserError(
            "tokenizer: is no byte-level BPE, and llama.cpp's format has no words for others here; "
            "export the checkpoint without its tokenizer.json"
        )
    if not model["merges"]:
        raise UserError("tokenizer: has no merges, which llama.cpp asks for; train it on more text")
    if id_count(tokenizer) > vocab_size:
        raise UserError(
            f"tokenizer: knows {id_count(tokenizer):,} ids, the model's vocab_size is {vocab_size:,}; "
            "give the model's own"
        )
    ends = end_of_text or (end_of_text_id(tokenizer),)
    if len(ends) > len(ENDS):
        raise UserError(
            f"end of text: {len(ends)} ids {list(ends)} end one; llama.cpp's format has room for "
            f"{len(ENDS)}: leave some out of generation_config.json"
        )
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [NORMAL if i in names else UNUSED for i in range(vocab_size)]
    for added in saved["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    begin = _begin_id(tokenizer)
    values: dict[str, Any] = {
        "model": BYTE_LEVEL_BPE,
        "pre": _name_of_cut(saved),
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in model["merges"]],
        **dict(zip(ENDS, ends, strict=False)),
        "add_bos_token": begin is not None,
    }
    if begin is not None:
        values["bos_token_id"] = begin
    return {PREFIX + key: value for key, value in values.items()}


def _name_of_cut(saved: dict[str, Any]) -> str:
    ours = json.loads(train_tokenizer([], vocab_size=MINIMUM_VOCAB_SIZE).to_str())
    if _cut_of(saved) == _cut_of(ours):
        return "gpt-2"
    for name, cut in CUTS.items():
        prototype = Tokenizer(models.BPE(ignore_merges=cut.ignore_merges))
        prototype.pre_tokenizer = cut.pre_tokenizer
        if cut.normalizer is not None:
            prototype.normalizer = cut.normalizer
        if _cut_of(saved) == _cut_of(json.loads(prototype.to_str())):
            return name
    raise UserError(
        "tokenizer: cuts text into words in none of the ways that are known here by llama.cpp's names "
        f"({', '.join(CUTS)}); export the checkpoint without its tokenizer.json"
    )


def _cut_of(saved: dict[str, Any]) -> tuple[Any, ...]:
    """All of a saved tokenizer that `tokenizer.ggml.pre` stands for."""
    cut = saved["pre_tokenizer"]
    for step in (cut or {}).get("pretokenizers", [cut]):
        if _type(step) == "ByteLevel":
            step.pop("trim_offsets", None)  # says where in the text a token stood, not which it is
    return cut, saved["normalizer"], saved["model"]["ignore_merges"]


def _type(step: dict[str, Any] | None) -> str | None:
    return step["type"] if step else None


def _begin_id(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before each text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    if framed == plain:
        return None
    if framed[1:] == plain:
        return framed[0]
    raise UserError(
        "tokenizer: adds tokens elsewhere than before a text; llama.cpp's format has no words for it "
        "here: export the checkpoint without its tokenizer.json"
    )
