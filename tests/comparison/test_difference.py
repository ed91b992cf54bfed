"""What is measured of two tensors, and the patterns that are told from them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mhmoe_np.audit.computation_order import in_order
from mhmoe_np.comparison.difference import difference
from mhmoe_np.comparison.patterns import pattern
from mhmoe_np.comparison.two_traces import compare_traces

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8))


def test_the_worst_element_and_its_size() -> None:
    a = X.copy()
    a[2, 5] += 0.5
    found = difference(a, X)
    assert found.place == (2, 5)
    assert (found.first, found.second) == (a[2, 5], X[2, 5])
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == found.max_abs / max(np.abs(a).max(), np.abs(X).max())
    cosine = 1 - np.vdot(a, X) / np.linalg.norm(a) / np.linalg.norm(X)
    assert found.cosine == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulps_count_the_numbers_in_between(dtype: type) -> None:
    a = np.array([1.0, -1.0, 0.0, 5e-324], dtype)
    b = a.copy()
    b[1] = np.nextafter(np.nextafter(b[1], dtype(0)), dtype(0))
    assert difference(a, b).max_ulp == 2
    tiny = np.nextafter(dtype(0), dtype(1))
    assert difference(np.array([tiny]), np.array([-tiny])).max_ulp == 2
    assert difference(np.array([dtype(-0.0)]), np.array([dtype(0.0)])).max_ulp == 0
    # float64 beside float32: in the coarser one.
    third = np.array([1 / 3])
    assert difference(third, third.astype(np.float32)).max_ulp == 0


def test_numbers_that_are_not_finite_differ_unless_they_are_the_same() -> None:
    a, b = np.array([np.nan, np.inf, 1.0]), np.array([np.nan, np.inf, 1.0])
    assert difference(a, b).max_abs == 0
    b[1] = 2.0
    assert difference(a, b).max_abs == math.inf
    assert difference(a, b).place == (1,)


INTERLEAVED = X.reshape(6, 2, 4).transpose(0, 2, 1).reshape(6, 8)
PATTERNS = {
    "ours transposed": X.T,
    "ours times 2.44949 = sqrt(6)": math.sqrt(6) * X,
    "ours times 0.408248 = 1/sqrt(6)": X / math.sqrt(6),
    "ours times -1": -X,
    "0 everywhere": 0 * X,
    "ours with its rows in reverse": X[::-1],
    "ours with its rows 1 and 4 exchanged": X[[0, 4, 2, 3, 1, 5]],
    "ours with its columns in exchanged halves": np.roll(X, 4, axis=1),
    "ours with its columns interleaved: one from each of 2 equal parts, in turn": INTERLEAVED,
    "ours plus one vector in every row, as by a bias that one of the two lacks": X + X[0],
    "ours but for 1 of 6 rows (3)": np.where(np.arange(6)[:, None] == 3, 0.0, X),
}


@pytest.mark.parametrize("words", PATTERNS)
def test_a_pattern_has_its_words(words: str) -> None:
    theirs = PATTERNS[words] * (1 + 1e-15 * RNG.normal(size=PATTERNS[words].shape))
    assert pattern(theirs, X, tolerance=1e-9) == words


def test_what_is_no_pattern_has_none() -> None:
    assert pattern(RNG.normal(size=(6, 8)), X, tolerance=1e-9) is None


def test_names_are_put_in_the_order_of_computation() -> None:
    layer = [
        "layers.2.input_layernorm.output",
        "layers.2.self_attn.q_proj.output",
        "layers.2.self_attn.k_proj.output",
        "layers.2.self_attn.v_proj.output",
        "layers.2.self_attn.o_proj.input",
        "layers.2.self_attn.o_proj.output",
        "layers.2.post_attention_layernorm.output",
        "layers.2.mlp.head_proj.output",
        "layers.2.router_logits",
        "layers.2.experts",
        "layers.2.mlp.experts.9.gate_proj.output",
        "layers.2.mlp.experts.9.up_proj.output",
        "layers.2.mlp.experts.9.ffn_sub_norm.output",
        "layers.2.mlp.experts.9.down_proj.output",
        "layers.2.mlp.experts.10.gate_proj.output",
        "layers.2.mlp.merge_proj.output",
        "layers.2.mlp.shared_expert.gate_proj.output",
        "layers.2.hidden",
    ]
    forward = ["input_ids", "target_ids", *layer, "layers.10.hidden", "norm.output", "logits"]
    forward += ["nll", "aux_loss", "z_loss", "loss", "something.else"]
    assert in_order(sorted(forward)) == forward
    gradients = [
        "grad.lm_head.weight",
        "grad.model.norm.weight",
        "grad.model.layers.10.mlp.experts.10.down_proj.weight",
        "grad.model.layers.10.mlp.experts.9.down_proj.weight",
        "grad.model.layers.2.mlp.merge_proj.weight",
        "grad.model.layers.2.mlp.gate.weight",
        "grad.model.layers.2.mlp.head_proj.bias",
        "grad.model.layers.2.mlp.head_proj.weight",
        "grad.model.layers.2.self_attn.q_proj.weight",
        "grad.model.embed_tokens.weight",
    ]
    assert in_order(sorted(forward + gradients)) == forward + gradients


@pytest.mark.parametrize(
    ("other", "verdict"), [([63, 20], "tie"), ([64, 21], "different"), ([62, 20], "different")]
)
def test_integers_of_activations_may_differ_by_one_at_the_tie_alone(
    other: list[int], verdict: str
) -> None:
    """[D9]"""
    first = {
        "m.input": np.array([[63.5, 20.2]]) * 0.01,
        "m.input_scale": np.array([0.01]),
        "m.input_integers": np.array([[64, 20]], np.int8),
    }
    second = first | {"m.input_integers": np.array([other], np.int8)}
    rows = {row.name: row for row in compare_traces(first, second).rows}
    assert rows["m.input_integers"].verdict == verdict
