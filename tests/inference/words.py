"""A tokenizer of whole words, so that a test's texts are the token ids it means: w0, w1, ..."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, processors

END = 0  # the id of the end of text, which is w0 too


def word_tokenizer(size: int, *, begins_with: int | None = None) -> Tokenizer:
    """Ids 0 .. size-1; `begins_with` stands before every text that it encodes."""
    names = ["<|endoftext|>", *(f"w{i}" for i in range(1, size))]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins_with is not None:
        name = names[begins_with]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, begins_with)]
        )
    return tokenizer


def text_of(ids: Iterable[int]) -> str:
    """The text whose tokens these are."""
    return " ".join(f"w{i}" for i in ids)
