"""The tokenizer of the embedded corpus, which the package brings."""

from __future__ import annotations

from pathlib import Path

from mhmoe_np.data import sample
from mhmoe_np.data.sources import embedded_sources
from mhmoe_np.data.tokenizer import load_tokenizer
from tests.data.ship_tokenizer import trained_anew


def test_the_shipped_tokenizer_is_the_one_that_training_gives() -> None:
    place, tokenizer = trained_anew()
    assert load_tokenizer(place).to_str() == tokenizer.to_str()
    assert [place] == list(place.parent.glob("tokenizer-*.json"))  # and no other is there


def test_other_texts_and_settings_have_no_shipped_tokenizer() -> None:
    texts = [file.read_text("utf-8") for source in embedded_sources() for file in source.files]
    named = {
        sample.trained_already(given, size, special)
        for given, size, special in (
            (texts, 2048, ()),
            (texts, 2049, ()),
            (texts, 2048, ("<pad>",)),
            (["".join(texts)], 2048, ()),
            ([texts[0][:-1], texts[0][-1:] + texts[1], texts[2]], 2048, ()),
            (texts[:1], 2048, ()),
        )
    }
    assert len(named) == 6
    assert not any(map(Path.exists, named))  # the shipped one is of the training part alone
