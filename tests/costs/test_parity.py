from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.costs.parity import (
    MATRICES_PER_EXPERT,
    ParityRow,
    moe_layer_macs,
    moe_layer_parameters,
    paper_rows,
    parity_row,
    router_macs,
    router_parameters,
    solve,
)
from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS


def changed(preset: str, **keys: object) -> ModelConfig:
    """A preset with some keys replaced."""
    return ModelConfig.model_validate({**MODEL_PRESETS[preset].model_dump(), **keys})


def test_the_table_of_the_specification():
    # [spec 7 Paper configs], [spec 7 model], [P1 section 3]
    macs = 4_718_592
    assert paper_rows() == [
        ParityRow("dense", 0, 0, 0, 2048, 4_718_592, macs, 0, 0),
        ParityRow("smoe", 1, 8, 1, 2048, 37_748_736, macs, 6_144, 6_144),
        ParityRow("fine-grained-smoe", 1, 16, 2, 1024, 37_748_736, macs, 12_288, 12_288),
        ParityRow("mh-moe-2", 2, 40, 2, 768, 36_569_088, macs, 15_360, 30_720),
        ParityRow("mh-moe-3", 3, 96, 3, 512, 38_928_384, macs, 24_576, 73_728),
    ]


def test_a_shared_expert_adds_a_dense_network():
    # [P1 Table 2]: a shared expert of inner width 2048 beside every MoE model.
    without = MODEL_PRESETS["paper-mh-moe-2"]
    shared = changed("paper-mh-moe-2", shared_expert_intermediate_size=2048)
    dense = 3 * 768 * 2048
    assert moe_layer_parameters(shared) - moe_layer_parameters(without) == dense
    assert moe_layer_macs(shared) - moe_layer_macs(without) == dense


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_projection_counts_where_it_is_present(head, merge):
    # [P1 Table 5]: one or both projections removed from the two-head model.
    config = changed("paper-mh-moe-2", moe_head_layer=head, moe_merge_layer=merge)
    assert moe_layer_macs(config) == 4_718_592 - (2 - head - merge) * 768**2
    assert moe_layer_parameters(config) == 36_569_088 - (2 - head - merge) * 768**2


def test_table_4_two_heads_with_projections_costs_more():
    # [P1 Table 4]: the "without" experts (F 1024) plus both projections.
    config = changed("paper-mh-moe-2", moe_intermediate_size=1024)
    assert moe_layer_macs(config) == 5_898_240


def test_the_papers_leading_terms_with_a_third_matrix():
    # [P1 eq. 6-7]: for one token 4 d^2 + 4 d d_moe k and 4 d d_moe k multiplications and additions,
    # with experts of two matrices; [spec 7 multiply-adds].
    d, F, k = 768, 1024, 2
    assert (
        2 * moe_layer_macs(MODEL_PRESETS["paper-fine-grained-smoe"]) == Fraction(3, 2) * 4 * d * F * k
    )
    d_mhmoe = 768
    assert (
        2 * moe_layer_macs(MODEL_PRESETS["paper-mh-moe-2"])
        == 4 * d**2 + Fraction(3, 2) * 4 * d * d_mhmoe * k
    )


def test_a_row_can_be_made_of_any_configuration():
    row = parity_row("mine", MODEL_PRESETS["small-mh-moe-3"])
    assert (row.name, row.heads, row.experts, row.intermediate_size) == ("mine", 3, 96, 128)


def test_router_counts():
    # [spec 7 router excluded]
    config = MODEL_PRESETS["paper-mh-moe-3"]
    assert router_parameters(config) == 96 * 256
    assert router_macs(config) == 3 * 96 * 256


@pytest.mark.parametrize(
    ("heads", "inner", "exact_experts", "experts"),
    [(2, 768, Fraction(124, 3), 41), (3, 512, Fraction(93), 93)],
)
def test_exact_parity_with_the_papers_smoe(heads, inner, exact_experts, experts):
    # [spec 7 equal FLOPs], [spec 7 equal parameters]: 41 1/3 and 93, where the paper chose 40 and 96.
    solution = solve(768, 8, 1, 2048, heads, heads, "swiglu")
    assert solution.exact_intermediate_size == inner == solution.intermediate_size
    assert (solution.exact_experts, solution.experts) == (exact_experts, experts)
    assert solution.macs == (4_718_592, 4_718_592)
    assert solution.macs.difference == solution.macs.percent == 0
    assert solution.parameters.baseline == 37_748_736


def test_what_rounding_costs():
    parameters = solve(768, 8, 1, 2048, 2, 2, "swiglu").parameters
    third_of_an_expert = 3 * 384 * 768 // 3
    assert parameters.difference == -third_of_an_expert
    assert parameters.percent == pytest.approx(-100 * third_of_an_expert / 37_748_736)


@pytest.mark.parametrize("d", [3, 6, 96])
@pytest.mark.parametrize("baseline_experts", [1, 8])
def test_the_papers_three_head_example(d, baseline_experts):
    # [P1 eq. 10]: d_moe = 4d, k = 1, h = 3 -> d_mhmoe = 3d and E = 4 E_moe - 1.
    solution = solve(d, baseline_experts, 1, 4 * d, 3, 1, "relu")
    assert solution.exact_intermediate_size == 3 * d
    assert solution.exact_experts == 4 * baseline_experts - 1
    assert solution.macs.difference == solution.parameters.difference == 0


def test_the_papers_two_head_examples():
    # [P1 section 2.3]: h = 2, d_moe = 4d -> d_mhmoe = 3d with top-1, or 3/2 d with top-2.
    assert solve(64, 8, 1, 256, 2, 1, "relu").exact_intermediate_size == 3 * 64
    assert solve(64, 8, 1, 256, 2, 2, "relu").exact_intermediate_size == Fraction(3 * 64, 2)


def test_the_printed_form_at_the_baselines_top_k():
    # [P1 eq. 8]: d_mhmoe = d_moe - d/k, the same k on both sides.
    solution = solve(768, 16, 3, 2048, 2, 3, "relu")
    assert solution.exact_intermediate_size == 2048 - Fraction(768, 3)


def test_the_two_matrix_form_does_not_give_the_papers_widths():
    assert solve(768, 8, 1, 2048, 2, 2, "relu").intermediate_size == 640
    assert solve(768, 8, 1, 2048, 3, 3, "relu").exact_intermediate_size == Fraction(1280, 3)


problems = st.fixed_dictionaries(
    {
        "sub_token_width": st.integers(1, 64),
        "heads": st.integers(1, 8),
        "top_k": st.integers(1, 8),
        "baseline_top_k": st.integers(1, 4),
        "spare_experts": st.integers(0, 60),
        "spare_width": st.integers(1, 4096),
        "form": st.sampled_from(["swiglu", "relu"]),
    }
)


@given(problems)
def test_before_rounding_the_layers_are_exactly_equal(problem):
    # [P1 eq. 9], [spec 7 equal FLOPs], [spec 7 equal parameters]
    D = problem["sub_token_width"] * problem["heads"]
    H, K, K0 = problem["heads"], problem["top_k"], problem["baseline_top_k"]
    E0, F0 = K0 + problem["spare_experts"], D + problem["spare_width"]
    solution = solve(D, E0, K0, F0, H, K, problem["form"])
    m = MATRICES_PER_EXPERT[problem["form"]]
    U = Fraction(D, H)

    macs = H * K * m * U * solution.exact_intermediate_size + 2 * D * D
    assert macs == m * D * F0 * K0 == solution.macs.baseline
    parameters = m * U * solution.intermediate_size * solution.exact_experts + 2 * D * D
    assert parameters == m * D * F0 * E0 == solution.parameters.baseline

    # Rounding moves a number by at most one half, except up to the least that makes sense.
    assert solution.intermediate_size >= 1
    assert solution.experts >= K
    if solution.intermediate_size > 1:
        inner_error = abs(solution.intermediate_size - solution.exact_intermediate_size)
        assert inner_error <= Fraction(1, 2)
        assert abs(solution.macs.difference) == m * D * K * inner_error
    if solution.experts > K:
        expert_error = abs(solution.experts - solution.exact_experts)
        assert expert_error <= Fraction(1, 2)
        expert = m * U * solution.intermediate_size
        assert abs(solution.parameters.difference) == expert * expert_error


@given(problems)
def test_the_solution_counts_as_a_configuration_does(problem):
    heads, top_k = problem["heads"], problem["top_k"]
    width = 2 * problem["sub_token_width"] * heads
    solution = solve(width, 8, 1, width + problem["spare_width"], heads, top_k, "swiglu")
    config = ModelConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=1,
        num_experts=solution.experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=solution.intermediate_size,
        moe_heads=heads,
        moe_head_layer=True,
        moe_merge_layer=True,
    )
    assert moe_layer_macs(config) == solution.macs.solution
    assert moe_layer_parameters(config) == solution.parameters.solution


def test_the_least_that_makes_sense():
    solution = solve(4, 2, 1, 3, 1, 8, "swiglu")
    assert (solution.exact_intermediate_size, solution.intermediate_size) == (Fraction(1, 24), 1)
    assert (solution.exact_experts, solution.experts) == (Fraction(10, 3), 8)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 8, 1, 2048, 2, 2), "hidden_size: 0 is too small; use at least 1"),
        ((768, 8, 1, 2048, 2, -1), "top_k: -1 is too small; use at least 1"),
        (
            (768, 8, 1, 2048, 5, 2),
            "heads: 5 does not divide hidden_size 768; use one of its divisors",
        ),
        (
            (768, 8, 9, 2048, 2, 2),
            "baseline_top_k: 9 is more than baseline_experts 8; lower it",
        ),
        (
            (768, 8, 1, 512, 2, 2),
            "baseline_intermediate_size: 512 leaves nothing for experts beside the head and merge "
            "layers of hidden_size 768; use at least 513",
        ),
    ],
)
def test_impossible_numbers_are_refused_by_name(numbers, message):
    with pytest.raises(UserError) as error:
        solve(*numbers, "swiglu")
    assert str(error.value) == message


def test_the_remedy_of_a_refusal_works():
    with pytest.raises(UserError, match="use at least 171"):
        solve(768, 8, 3, 170, 2, 2, "swiglu")
    assert solve(768, 8, 3, 171, 2, 2, "swiglu").exact_intermediate_size == Fraction(1, 2)
