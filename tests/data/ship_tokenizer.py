"""Train the tokenizer in the package anew: `python -m tests.data.ship_tokenizer`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from tokenizers import Tokenizer

from mhmoe_cli.run_settings import base_layers
from mhmoe_np.data import prepare, sample
from mhmoe_np.data.prepare import prepare_text
from mhmoe_np.data.sources import find_sources
from mhmoe_np.data.tokenizer import save_tokenizer, train_tokenizer
from mhmoe_np.settings.run import resolve
from mhmoe_np.training.preparation import preparation_settings


def trained_anew() -> tuple[Path, Tokenizer]:
    """The tokenizer of a run without arguments, trained now, and its place in the package."""
    found: list[tuple[Path, Tokenizer]] = []

    def train(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
        found.append((sample.trained_already(texts, vocab_size, ()), tokenizer))
        return tokenizer

    settings = preparation_settings(resolve(base_layers(None, None)))
    with tempfile.TemporaryDirectory() as folder, patch.object(prepare, "train_on_sample", train):
        prepare_text(Path(folder), find_sources([], {}), settings, tokenizer=None, workers=1)
    return found[0]


def main() -> None:
    place, tokenizer = trained_anew()
    for earlier in place.parent.glob("tokenizer-*.json"):
        earlier.unlink()
    save_tokenizer(tokenizer, place)


if __name__ == "__main__":
    main()
