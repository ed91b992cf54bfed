"""Closed-form size and cost of a feed-forward layer, and the widths that make two layers equal.

Follows [P1 sections 2.2-2.3]. Departs: counts the multiply-adds of the matrices alone (no biases,
norms, activations or additions), with three matrices an expert as the paper's configurations have;
`solve` offers the two-matrix form it prints as well [spec 7].
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import LARGEST_SIZE, ModelConfig, shown
from mhmoe_np.settings.presets import MODEL_PRESETS, PAPER_MODELS

ExpertForm: TypeAlias = Literal["swiglu", "relu"]

# swiglu: gate, up and down, as every expert of this package; relu: max(x W1, 0) W2 [P1 eq. 5].
MATRICES_PER_EXPERT: dict[ExpertForm, int] = {"swiglu": 3, "relu": 2}


def moe_layer_parameters(config: ModelConfig) -> int:
    """Matrix parameters of one MoE layer, or of a dense feed-forward layer where E = 0.

    E·3·U·F for the experts, D² for each of the head and merge layers that is present, 3·D·F for a
    shared expert. The router is `router_parameters`.

    Source   [spec 7 MoE-layer parameters]; with 3 matrices in place of 2 either side of [P1 eq. 9]
    """
    if config.num_experts == 0:
        return _dense_weights(config, config.intermediate_size)
    experts = 3 * config.num_experts * config.sub_token_width * config.moe_intermediate_size
    return experts + _outside_experts(config)  # P1 eq. 9, one side


def moe_layer_macs(config: ModelConfig) -> int:
    """Multiply-adds of one token through one MoE layer, or a dense feed-forward layer where E = 0.

    H·K expert calls of 3·U·F each, D² for each of the head and merge layers that is present, 3·D·F
    for a shared expert. The router is `router_macs`.

    Source   [spec 7 multiply-adds]; the leading terms of [P1 eq. 6] and, without head and merge layer,
             [P1 eq. 7], with 3 matrices in place of 2; these count multiplications and additions
    """
    if config.num_experts == 0:
        return _dense_weights(config, config.intermediate_size)
    calls = config.moe_heads * config.num_experts_per_tok
    experts = 3 * calls * config.sub_token_width * config.moe_intermediate_size
    # P1 eq. 6: 2 (2 B d^2 - B d) + (4 B d d_moe - B d - B d_moe h) k
    # P1 eq. 7: (4 B d d_moe - B d_moe - B d) k
    return experts + _outside_experts(config)


def router_parameters(config: ModelConfig) -> int:
    """E·U: the router's parameters in one MoE layer; 0 in a dense one.

    Source   [spec 7 router excluded]
    """
    return config.num_experts * config.sub_token_width


def router_macs(config: ModelConfig) -> int:
    """H·E·U: the router's multiply-adds for one token in one MoE layer.

    Source   [spec 7 router excluded]
    """
    return config.moe_heads * router_parameters(config)


def _dense_weights(config: ModelConfig, inner: int) -> int:
    """What a SwiGLU network of full width has in parameters and costs a token in multiply-adds."""
    return 3 * config.hidden_size * inner


def _outside_experts(config: ModelConfig) -> int:
    """The head layer, merge layer and shared expert: each weight is used once by every token."""
    projections = (config.moe_head_layer + config.moe_merge_layer) * config.hidden_size**2
    return projections + _dense_weights(config, config.shared_expert_intermediate_size)


class ParityRow(NamedTuple):
    """One row of the table of spec 7. A dense model has 0 heads, experts and top-k."""

    name: str
    heads: int  # H
    experts: int  # E
    top_k: int  # K
    intermediate_size: int  # F of one expert, or of the dense network
    parameters: int
    macs_per_token: int
    router_parameters: int
    router_macs: int


def parity_row(name: str, config: ModelConfig) -> ParityRow:
    """The row of one model: the counts are those of a single MoE (or dense) layer.

    Source   [spec 7 model]
    """
    dense = config.num_experts == 0
    return ParityRow(
        name=name,
        heads=0 if dense else config.moe_heads,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size if dense else config.moe_intermediate_size,
        parameters=moe_layer_parameters(config),
        macs_per_token=moe_layer_macs(config),
        router_parameters=router_parameters(config),
        router_macs=router_macs(config),
    )


def paper_rows() -> list[ParityRow]:
    """The five models of the paper's tables.

    Source   [spec 7 Paper configs], [P1 section 3]
    """
    return [parity_row(name, MODEL_PRESETS[f"paper-{name}"]) for name in PAPER_MODELS]


class Comparison(NamedTuple):
    """One count of the baseline's layer and of the solution's."""

    baseline: int
    solution: int

    @property
    def difference(self) -> int:
        """How much more the solution has."""
        return self.solution - self.baseline

    @property
    def percent(self) -> float:
        """The difference in percent of the baseline."""
        return 100 * self.difference / self.baseline


@dataclass(frozen=True, slots=True)
class Solution:
    """An MH-MoE layer as large and as costly as a baseline's, before and after rounding.

    `exact_experts` belongs to the rounded `intermediate_size`, so that only one rounding is left
    in the parameters. `macs` (a token's multiply-adds) and `parameters` compare the rounded layer,
    routers excluded on both sides.
    """

    exact_intermediate_size: Fraction  # F
    exact_experts: Fraction  # E
    intermediate_size: int
    experts: int
    macs: Comparison
    parameters: Comparison


def solve(
    hidden_size: int,
    baseline_experts: int,
    baseline_top_k: int,
    baseline_intermediate_size: int,
    heads: int,
    top_k: int,
    form: ExpertForm,
) -> Solution:
    """Find the inner width and the number of experts of an MH-MoE layer equal to a baseline's.

    The layer has head and merge layers, whatever `heads` is; the baseline has neither. With D the
    width, m matrices an expert (`form`) and c = 2·D/m, the inner width that head and merge cost:

    - equal multiply-adds: m·D·F·K + 2·D² = m·D·F0·K0, hence F = (K0·F0 - c) / K;
    - equal parameters: m·(D/H)·F·E + 2·D² = m·D·F0·E0, hence E = H·(E0·F0 - c) / F.

    F is rounded to the nearest integer of at least 1 before E is found, and E to the nearest of at
    least K; a tie goes to the even integer.

    Raises   UserError: a number is below 1 or beyond 2^31-1, `heads` does not divide `hidden_size`,
             the baseline chooses more experts than it has, or is too small to pay for head and merge.
    Source   swiglu [spec 7 equal FLOPs], [spec 7 equal parameters], which the paper's configurations
             obey; relu [P1 eq. 8-9], whose printed F = F0 - D/K is the case K = K0, and the example
             [P1 eq. 10]
    """
    numbers = {
        "hidden_size": hidden_size,
        "baseline_experts": baseline_experts,
        "baseline_top_k": baseline_top_k,
        "baseline_intermediate_size": baseline_intermediate_size,
        "heads": heads,
        "top_k": top_k,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name}: {shown(number)} is too small; use at least 1")
        if number > LARGEST_SIZE:
            raise UserError(f"{name}: {shown(number)} is too large; use at most {LARGEST_SIZE}")
    if hidden_size % heads:
        raise UserError(
            f"heads: {heads} does not divide hidden_size {hidden_size}; use one of its divisors"
        )
    if baseline_top_k > baseline_experts:
        raise UserError(
            f"baseline_top_k: {baseline_top_k} is more than baseline_experts {baseline_experts}; "
            "lower it"
        )
    matrices = MATRICES_PER_EXPERT[form]
    head_and_merge = Fraction(2 * hidden_size, matrices)
    active = baseline_top_k * baseline_intermediate_size - head_and_merge
    if active <= 0:
        least = head_and_merge // baseline_top_k + 1
        raise UserError(
            f"baseline_intermediate_size: {baseline_intermediate_size} leaves nothing for experts "
            f"beside the head and merge layers of hidden_size {hidden_size}; use at least {least}"
        )
    # E0 >= K0 makes the stored width positive where the active one is.
    stored = baseline_experts * baseline_intermediate_size - head_and_merge

    exact_intermediate_size = active / top_k  # P1 eq. 8: d_mhmoe = d_moe - d/k
    intermediate_size = max(1, round(exact_intermediate_size))
    # P1 eq. 9: 2 d d_moe E_moe = 2 d^2 + 2 (d/h) d_mhmoe E_mhmoe
    # P1 eq. 10: for d_moe = 4d, k = 1, h = 3: d_mhmoe = 3d, E_mhmoe = 4 E_moe - 1
    exact_experts = heads * stored / intermediate_size
    experts = max(top_k, round(exact_experts))

    matrix = matrices * hidden_size
    projections = 2 * hidden_size**2
    return Solution(
        exact_intermediate_size=exact_intermediate_size,
        exact_experts=exact_experts,
        intermediate_size=intermediate_size,
        experts=experts,
        macs=Comparison(
            baseline=matrix * baseline_intermediate_size * baseline_top_k,
            solution=matrix * intermediate_size * top_k + projections,
        ),
        parameters=Comparison(
            baseline=matrix * baseline_intermediate_size * baseline_experts,
            solution=matrix // heads * intermediate_size * experts + projections,
        ),
    )
