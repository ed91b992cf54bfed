"""What is exported as GGUF, read and computed by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.audit.trace import trace
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.exchange.gguf_export import export_gguf
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.load import load_operations
from tests.whole_models import parameters_of

xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp: xllamacpp is not installed")

OPS = load_operations("numpy")
FLOAT32 = 0  # its number for numbers of a cache
TEXTS = ["the cat sat on the mat and the dog sat on the log " * 3, "a dog and a cat on a log"]


def served(path: Path) -> Any:
    """llama.cpp, with a model in it."""
    given = xllamacpp.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.verbosity, given.warmup = 64, 1, 0, False
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    # Its flash attention rounds to float16.
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.cache_type_k = given.cache_type_v = FLOAT32
    return xllamacpp.Server(given)


@pytest.mark.parametrize("kind", ["dense", "dense-grouped-heads", "fine-grained"])
def test_its_next_tokens_have_our_probabilities(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    parameters = parameters_of(kind, vocab_size=280, max_position_embeddings=64)
    export_gguf(parameters, tokenizer, tmp_path / "model.gguf")
    server = served(tmp_path / "model.gguf")
    window = np.random.default_rng(6).integers(0, 280, (1, 13))  # the last token is a target alone
    logits = trace(Model.of(parameters, ops=OPS), window, gradients=False, ops=OPS)["logits"]
    for length in (1, 5, 12):
        wide = logits.reshape(12, 280)[length - 1].astype(np.float64)
        expected = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
        request = {"prompt": window[0, :length].tolist(), "n_predict": 1, "n_probs": 280}
        # Of a token that is part of a character it says nothing. What is drawn is another matter.
        drawn = {"temperature": 0, "logit_bias": [[tokenizer.token_to_id("a"), 1000]]}
        made = server.handle_completions({**request, **drawn, "cache_prompt": False})
        said = made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(280, np.nan)
        for each in said:
            found[each["id"]] = each["logprob"]
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
