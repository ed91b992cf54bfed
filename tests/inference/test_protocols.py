"""What each perplexity protocol scores, token by token, computed anew from whole windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.data.tokenised_text import TokenisedText, tokenise_documents
from mhmoe_np.errors import UserError
from mhmoe_np.inference.evaluate import DomainScore, evaluate, standard_error
from mhmoe_np.inference.protocols import PROTOCOLS, Protocol, choose_protocol
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.operations.load import load_operations
from tests.inference.words import END, text_of, word_tokenizer
from tests.operations.cases import quick
from tests.whole_models import parameters_of

OPS = load_operations("numpy")
TOKENIZER = word_tokenizer(37)
FIRST, SECOND = [3, 30, 7, 7, 19, 36, 2], [11, 5, 24, 8]
STREAM = [*FIRST, END, *SECOND]


def model_of(dtype: Any = np.float64, kind: str = "mh2-capacity") -> Model:
    return Model.of(parameters_of(kind, dtype, seed=3), ops=OPS)


def tokenised(*documents: list[int]) -> TokenisedText:
    return tokenise_documents("d", list(map(text_of, documents)), TOKENIZER)


def nll_of(model: Model, *inputs: int, target: int) -> float:
    """Of one token given all that is before it, by a forward pass of nothing else."""
    y_ND, _ = forward(model, np.array([inputs]), None, drop=False, ops=OPS)
    logits = np.asarray(y_ND[-1] @ model.weights.output_VD.T, np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def by_hand(model: Model, windows: list[tuple[list[int | str], list[int]]]) -> tuple[float, int]:
    """The NLL of windows: places in the stream, "E" for a beginning of text, and which are scored."""
    total, count = 0.0, 0
    for window, scored in windows:
        ids = [END if place == "E" else STREAM[int(place)] for place in window]
        for place in scored:
            before = ids[: window.index(place)]
            total += nll_of(model, *before, target=STREAM[place])
            count += 1
    return total, count


E = "E"
CASES: dict[str, tuple[Protocol, list[tuple[list[Any], list[int]]]]] = {
    "disjoint": (
        Protocol("disjoint", 4),
        [
            ([0, 1, 2, 3, 4], [1, 2, 3, 4]),
            ([4, 5, 6, 7, 8], [5, 6, 7, 8]),
            ([8, 9, 10, 11], [9, 10, 11]),
        ],
    ),
    "disjoint behind a beginning": (
        Protocol("disjoint", 4, bos_token_id=END),
        [
            ([E, 0, 1, 2, 3], [0, 1, 2, 3]),
            ([E, 4, 5, 6, 7], [4, 5, 6, 7]),
            ([E, 8, 9, 10, 11], [8, 9, 10, 11]),
        ],
    ),
    "stride 2": (
        Protocol("stride", 4, stride=2),
        [
            ([0, 1, 2, 3], [1, 2, 3]),
            ([2, 3, 4, 5], [4, 5]),
            ([4, 5, 6, 7], [6, 7]),
            ([6, 7, 8, 9], [8, 9]),
            ([8, 9, 10, 11], [10, 11]),
        ],
    ),
    "stride 3, the last window is short": (
        Protocol("stride", 4, stride=3),
        [
            ([0, 1, 2, 3], [1, 2, 3]),
            ([3, 4, 5, 6], [4, 5, 6]),
            ([6, 7, 8, 9], [7, 8, 9]),
            ([9, 10, 11], [10, 11]),
        ],
    ),
    "stride of a whole window": (  # transformers' loss shifts: what begins a window is not scored
        Protocol("stride", 4, stride=4),
        [([0, 1, 2, 3], [1, 2, 3]), ([4, 5, 6, 7], [5, 6, 7]), ([8, 9, 10, 11], [9, 10, 11])],
    ),
    "stride 2 behind a beginning": (
        Protocol("stride", 4, stride=2, bos_token_id=END),
        [
            ([E, 0, 1, 2], [0, 1, 2]),
            ([E, 2, 3, 4], [3, 4]),
            ([E, 4, 5, 6], [5, 6]),
            ([E, 6, 7, 8], [7, 8]),
            ([E, 8, 9, 10], [9, 10]),
            ([E, 10, 11], [11]),
        ],
    ),
    "lm-eval-rolling": (  # the last window of a document is filled up from the left
        Protocol("lm-eval-rolling", 4, bos_token_id=END),
        [
            ([E, 0, 1, 2, 3], [0, 1, 2, 3]),
            ([2, 3, 4, 5, 6], [4, 5, 6]),
            ([E, 8, 9, 10, 11], [8, 9, 10, 11]),
        ],
    ),
    "lm-eval-rolling in several windows": (
        Protocol("lm-eval-rolling", 2, bos_token_id=END),
        [
            ([E, 0, 1], [0, 1]),
            ([1, 2, 3], [2, 3]),
            ([3, 4, 5], [4, 5]),
            ([4, 5, 6], [6]),
            ([E, 8, 9], [8, 9]),
            ([9, 10, 11], [10, 11]),
        ],
    ),
    "llama-cpp": (
        Protocol("llama-cpp", 4),
        [([0, 1, 2, 3], [3]), ([4, 5, 6, 7], [7]), ([8, 9, 10, 11], [11])],
    ),
    "llama-cpp of an odd window, what is left is dropped": (
        Protocol("llama-cpp", 5),
        [([0, 1, 2, 3, 4], [3, 4]), ([5, 6, 7, 8, 9], [8, 9])],
    ),
    "llama-cpp behind a beginning": (  # it stands before the text too, and in each chunk's first place
        Protocol("llama-cpp", 4, bos_token_id=END),
        [([E, 0, 1, 2], [2]), ([E, 4, 5, 6], [6]), ([E, 8, 9, 10], [10])],
    ),
}


@pytest.mark.parametrize("batch_tokens", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_a_protocol_scores_the_tokens_it_should_given_what_it_should(
    case: str, batch_tokens: int
) -> None:
    protocol, windows = CASES[case]
    model = model_of()
    score = evaluate(
        model,
        tokenised(FIRST, SECOND),
        ops=OPS,
        protocol=protocol,
        batch_tokens=batch_tokens,
    )
    nll, tokens = by_hand(model, windows)
    assert score.nll == pytest.approx(nll, rel=1e-12)
    assert (score.tokens, score.text_tokens, score.documents) == (tokens, 12, 2)


def test_another_window_another_stride_and_a_beginning_are_other_numbers() -> None:
    model = model_of()
    found = {case: by_hand(model, windows) for case, (_, windows) in CASES.items()}
    assert len({round(nll / tokens, 6) for nll, tokens in found.values()}) == len(CASES)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("kind", ["mh2-capacity", "mh2-ternary", "fine-grained"])
def test_one_window_at_once_and_16_score_the_same(name: Any, kind: str) -> None:
    model, rng = model_of(np.float32, kind), np.random.default_rng(1)
    documents = [rng.integers(1, 37, length).tolist() for length in (3, 50, 1, 31, 200, 32, 33)]
    protocol = choose_protocol(name, model.config, TOKENIZER)
    one, many = (
        evaluate(
            model,
            tokenised(*documents),
            ops=OPS,
            protocol=protocol,
            batch_tokens=batch * protocol.window,
        )
        for batch in (1, 16)
    )
    assert one.nll == pytest.approx(many.nll, rel=1e-6)
    assert one.standard_error == pytest.approx(many.standard_error, rel=1e-5)
    assert (one.tokens, one.corpus_sha256) == (many.tokens, many.corpus_sha256)


@quick(100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda given: sum(given) > 1),
    st.integers(2, 12),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_token_is_scored_once_within_the_window(
    lengths: list[int], window: int, stride: int, bos: bool
) -> None:
    total, begin = sum(lengths) + len(lengths) - 1, END if bos else None
    stride = min(stride, window - 1)
    separators = set(np.cumsum([length + 1 for length in lengths])[:-1] - 1)
    for protocol, unscored in (
        (Protocol("disjoint", window, None, begin), set() if bos else {0}),
        (Protocol("stride", window, stride, begin), set() if bos else {0}),
        (Protocol("lm-eval-rolling", window, None, END), separators),
    ):
        windows = list(protocol.windows(np.array(lengths)))
        scored = [place for w in windows for place in range(w.end - w.scored, w.end)]
        assert sorted(scored) == sorted(set(range(total)) - unscored)
        for w in windows:
            assert 0 <= w.begin <= w.end - w.scored <= w.end <= total
            assert w.scored <= w.inputs <= window  # so that each has a token before it


def test_a_standard_error_is_of_documents() -> None:
    # By hand: r = 30/10 = 3; left over are 10 - 3*2 = 4, 8 - 3*4 = -4, 12 - 3*4 = 0: 32 in squares.
    nll, tokens = np.array([10.0, 8.0, 12.0, 0.0]), np.array([2, 4, 4, 0])
    assert standard_error(nll, tokens) == pytest.approx(math.sqrt(3 / 2 * 32) / 10, rel=1e-15)
    assert standard_error(nll[:1], tokens[:1]) is None


def test_a_standard_error_of_equal_documents_is_that_of_their_mean() -> None:
    nll = np.random.default_rng(0).normal(size=50)
    expected = nll.std(ddof=1) / math.sqrt(50) / 7
    assert standard_error(nll, np.full(50, 7)) == pytest.approx(expected, rel=1e-12)


def test_the_standard_error_of_a_score_is_that_of_its_documents() -> None:
    model = model_of()
    protocol = Protocol("lm-eval-rolling", 32, bos_token_id=END)
    documents = [FIRST, SECOND, [9, 9, 9]]
    each = [evaluate(model, tokenised(document), ops=OPS, protocol=protocol) for document in documents]
    assert all(score.standard_error is None for score in each)
    score = evaluate(model, tokenised(*documents), ops=OPS, protocol=protocol)
    nll, tokens = np.array([s.nll for s in each]), np.array([s.tokens for s in each])
    assert score.nll == pytest.approx(nll.sum(), rel=1e-12)
    assert score.standard_error == pytest.approx(standard_error(nll, tokens), rel=1e-9)


def test_figures_per_word_and_byte_need_the_whole_text() -> None:
    model = model_of()
    for protocol, whole in (
        (Protocol("disjoint", 4), True),
        (Protocol("stride", 4, 2), True),
        (Protocol("stride", 4, 4), False),
        (Protocol("lm-eval-rolling", 4, None, END), True),
        (Protocol("llama-cpp", 4), False),
    ):
        score = evaluate(model, tokenised(FIRST, SECOND), ops=OPS, protocol=protocol)
        values = score.as_dict()
        for key in ("word_ppl", "byte_ppl", "bits_per_byte"):
            assert (values[key] is not None) == whole
        assert values["token_ppl"] == pytest.approx(math.exp(values["mean_nll"]))
        assert DomainScore.from_dict(values) == score


def test_rolling_counts_words_as_the_harness_does() -> None:
    text = tokenise_documents("d", [" w1  w2\n", "w3"], TOKENIZER)
    assert (text.word_count, text.byte_count) == (3, 10)
    protocol = Protocol("lm-eval-rolling", 4, None, END)
    score = evaluate(model_of(), text, ops=OPS, protocol=protocol)
    assert (score.words, score.bytes) == (5, 10)  # "", w1, w2, "" and w3


# ---- what is chosen ------------------------------------------------------------------------------


def test_what_is_not_said_is_as_the_protocols_program_has_it() -> None:
    config = model_of().config
    begins = word_tokenizer(37, begins_with=4)
    chosen = {
        (name, tokenizer is begins): choose_protocol(name, config, tokenizer)
        for name in PROTOCOLS
        for tokenizer in (TOKENIZER, begins)
    }
    assert {key: (p.window, p.stride, p.bos_token_id) for key, p in chosen.items()} == {
        ("disjoint", False): (32, None, None),
        ("disjoint", True): (32, None, None),
        ("stride", False): (32, 16, None),
        ("stride", True): (32, 16, None),
        ("lm-eval-rolling", False): (32, None, END),
        ("lm-eval-rolling", True): (32, None, 4),
        ("llama-cpp", False): (32, None, None),
        ("llama-cpp", True): (32, None, 4),
    }
    assert choose_protocol("stride", config, TOKENIZER, bos=True, window=8, stride=7).as_dict() == {
        "protocol": "stride",
        "window": 8,
        "stride": 7,
        "bos": True,
        "bos_token_id": END,
    }


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("disjoint", {"stride": 4}, "--stride 4: is of --protocol stride, not of disjoint"),
        (
            "disjoint",
            {"window": 33},
            "--window 33: must be 1 to the model's max_position_embeddings 32",
        ),
        ("llama-cpp", {"window": 2}, "--window 2: must be 3 to"),
        ("stride", {"stride": 33}, "--stride 33: must be 1 to 32"),
        ("stride", {"stride": 32, "bos": True}, "--stride 32: must be 1 to 31"),
        ("stride", {"stride": 0}, "--stride 0: must be 1 to 32"),
        ("lm-eval-rolling", {"bos": False}, "--no-bos: lm-eval-rolling always begins"),
    ],
)
def test_what_does_not_go_together_is_refused(name: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_protocol(name, model_of().config, TOKENIZER, **options)


def test_a_beginning_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"token 39, is beyond the model's vocab_size 37"):
        choose_protocol("llama-cpp", model_of().config, word_tokenizer(40, begins_with=39))


def test_a_text_of_fewer_than_two_windows_is_none_for_llama_cpp() -> None:
    with pytest.raises(UserError, match="has 12 tokens; llama-cpp needs two windows of 7"):
        evaluate(
            model_of(),
            tokenised(FIRST, SECOND),
            ops=OPS,
            protocol=Protocol("llama-cpp", 7),
        )


def test_progress_comes_to_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        model_of(),
        tokenised(FIRST, SECOND),
        ops=OPS,
        protocol=Protocol("disjoint", 4),
        batch_tokens=4,
        on_progress=lambda *said: seen.append(said),
    )
    assert seen == [
        ("scoring d", 4, 11),
        ("scoring d", 8, 11),
        ("scoring d", 11, 11),
    ]
