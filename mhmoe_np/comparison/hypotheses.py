"""Mistakes that implementations make, each as one deliberate change of a layer.

When another's layer differs from ours, it is computed once more with each of these changes; the one
with which the other's numbers come out is the cause. A hypothesis is a function that yields changes of
a layer's configuration, its tensors or one operation; it yields none where it cannot apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.comparison.from_inputs import Layer
from mhmoe_np.comparison.given import Given
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import LAYERS, Parameters
from mhmoe_np.operations.table import (
    Dispatch,
    ExpertCache,
    Operations,
    Quantization,
    Routing,
    Weight,
)
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray

Tensors = Mapping[str, FloatArray]
"""A layer's tensors as they are on disk, by their names within the layer."""

EPSILONS = (0.0, 1e-12, 1e-8, 1.1920929e-07, 1e-6, 1e-5, 1e-3)  # 2^-23 is PyTorch's own in float32
THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)


class Change(NamedTuple):
    """One deliberate change of a layer, and what it means for the implementation that made it."""

    cause: str  # a sentence without its full stop
    settings: Mapping[str, Any] = MappingProxyType({})
    tensors: Tensors = MappingProxyType({})
    operations: type[Given] = Given


Hypothesis = Callable[[ModelConfig, Tensors], Iterator[Change]]


def alone(config: ModelConfig, number: int) -> ModelConfig:
    """The configuration of a model that is layer `number` of `config`'s and nothing else."""
    moe = config.is_moe_layer(number)
    return config.model_copy(
        update={
            "num_hidden_layers": 1,
            "decoder_sparse_step": 1,
            "num_experts": config.num_experts if moe else 0,
            "vocab_size": 1,
            "tie_word_embeddings": True,
        }
    )


def tensors_of(parameters: Parameters, number: int) -> dict[str, FloatArray]:
    """A layer's tensors by their names within it."""
    prefix = f"{LAYERS}{number}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in parameters.tensors.items()
        if name.startswith(prefix)
    }


def changed(
    config: ModelConfig, tensors: Tensors, change: Change, *, ops: Operations
) -> tuple[Layer, Given]:
    """The layer with a change, and the operations to compute it with.

    config: of the layer alone.
    """
    config = config.model_copy(update=dict(change.settings))
    tensors = {**tensors, **change.tensors}
    dtype = next(iter(tensors.values())).dtype
    parameters = Parameters(config, dtype)
    for name, target in tensors_of(parameters, 0).items():
        target[...] = tensors.get(name, 0)  # 0: the bias of a projection that is there for the change
    given = change.operations(ops)
    return Layer.of(Model.of(parameters, ops=given), 0), given


# ---- weights ---------------------------------------------------------------------------------


def transposed(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """A square matrix applied as x @ W, or all of them."""
    by_name = {}
    for name, group in _groups(tensors).items():
        if all(tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] for tensor in group.values()):
            by_name[name] = {part: tensor.T for part, tensor in group.items()}
    yield from _one_or_all(by_name, "{} is transposed", "all square matrices are transposed")


def left_out_or_doubled(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Norm weights and biases, one or all, that are not applied, or applied as 1 + weight."""
    ones, more, zeros = {}, {}, {}
    for name, group in _groups(tensors).items():
        if name.endswith("norm.weight"):
            ones[name] = {part: np.ones_like(tensor) for part, tensor in group.items()}
            more[name] = {part: 1 + tensor for part, tensor in group.items()}
        if name.endswith(".bias"):
            zeros[name] = {part: np.zeros_like(tensor) for part, tensor in group.items()}
    yield from _one_or_all(ones, "{} is not applied", "no norm's weight is applied")
    yield from _one_or_all(
        more, "{} is applied as 1 + weight", "every norm's weight is applied as 1 + weight"
    )
    yield from _one_or_all(zeros, "{} is not added", "no bias is added")


def _one_or_all(by_name: Mapping[str, Tensors], one: str, every: str) -> Iterator[Change]:
    """A change of each name's tensors by itself, and of all at once: a mistake in a shared function."""
    for name, tensors in by_name.items():
        yield Change(one.format(name), tensors=tensors)
    if len(by_name) > 1:
        together = {part: tensor for tensors in by_name.values() for part, tensor in tensors.items()}
        yield Change(every, tensors=together)


def _groups(tensors: Tensors) -> dict[str, dict[str, FloatArray]]:
    """The tensors by name, all experts' ones together."""
    groups: dict[str, dict[str, FloatArray]] = {}
    for name, tensor in tensors.items():
        prefix, experts, rest = name.partition("experts.")
        shown = f"{prefix}experts.*.{rest.partition('.')[2]}" if experts else name
        groups.setdefault(shown, {})[name] = tensor
    return groups


def gate_and_up_exchanged(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """down(act(up(x)) * gate(x))."""
    by_network: dict[str, dict[str, FloatArray]] = {}
    for name in tensors:
        prefix, gate, _ = name.rpartition("gate_proj.weight")
        if gate:
            up, network = f"{prefix}up_proj.weight", prefix.rstrip("0123456789.")
            swapped = by_network.setdefault(network, {})
            swapped |= {name: tensors[up], up: tensors[name]}
    yield from _one_or_all(
        by_network,
        "gate_proj and up_proj of {} are exchanged",
        f"gate_proj and up_proj of {' and '.join(by_network)} are exchanged",
    )


def experts_in_another_order(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Expert e computes with the weights of another one."""
    E = config.num_experts
    orders = {
        'sorted as strings ("10" before "2")': sorted(range(E), key=str),
        "in reverse": list(range(E))[::-1],
        "moved up by one": [(e + 1) % E for e in range(E)],
        "moved down by one": [(e - 1) % E for e in range(E)],
    }
    for shown, order in orders.items():
        if order != list(range(E)):
            yield Change(f"the experts are {shown}", tensors=reordered(tensors, order))
    for a in range(E):
        for b in range(a + 1, E):
            order = list(range(E))
            order[a], order[b] = b, a
            yield Change(f"experts {a} and {b} are exchanged", tensors=reordered(tensors, order))


def reordered(tensors: Tensors, order: list[int]) -> dict[str, FloatArray]:
    """Expert e's tensors are those of expert order[e]."""
    found = {}
    for name in tensors:
        prefix, experts, rest = name.partition("mlp.experts.")
        if experts and not prefix:
            number, _, part = rest.partition(".")
            found[name] = tensors[f"mlp.experts.{order[int(number)]}.{part}"]
    return found


def heads_interleaved(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Sub-token j holds features j, j + H, j + 2H, ... instead of the j-th run of U features."""
    H, U, D = config.moe_heads, config.sub_token_width, config.hidden_size
    if not config.num_experts or H == 1:
        return
    order = np.arange(D).reshape(U, H).T.ravel()  # feature j*U + u of ours is feature u*H + j of theirs
    eye = np.eye(D, dtype=next(iter(tensors.values())).dtype)
    head = tensors.get("mlp.head_proj.weight", eye)
    merge = tensors.get("mlp.merge_proj.weight", eye)
    split = {"mlp.head_proj.weight": head[order]}
    if "mlp.head_proj.bias" in tensors:
        split["mlp.head_proj.bias"] = tensors["mlp.head_proj.bias"][order]
    join = {"mlp.merge_proj.weight": merge[:, order]}
    both = {"moe_head_layer": True, "moe_merge_layer": True}
    yield Change("sub-tokens are interleaved features, not contiguous ones", both, split | join)
    yield Change(
        "sub-tokens are split into interleaved features and joined as contiguous ones",
        {"moe_head_layer": True},
        split,
    )
    yield Change(
        "sub-tokens are split into contiguous features and joined as interleaved ones",
        {"moe_merge_layer": True},
        join,
    )


# ---- settings --------------------------------------------------------------------------------


def another_epsilon(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """rms_norm_eps."""
    for eps in EPSILONS:
        if eps != config.rms_norm_eps:
            yield Change(
                f"rms_norm_eps is {eps:g} and not {config.rms_norm_eps:g}", {"rms_norm_eps": eps}
            )


def another_theta(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """rope_theta."""
    for theta in THETAS:
        if theta != config.rope_theta:
            yield Change(
                f"rope_theta is {theta:g} and not {config.rope_theta:g}", {"rope_theta": theta}
            )


def a_part_left_out(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Parts that the configuration has and the other has not, or the reverse."""
    if config.num_experts:
        if config.num_experts_per_tok > 1:
            flag = not config.norm_topk_prob
            shown = "renormalised" if flag else "not renormalised"
            yield Change(f"gates are {shown} over the chosen experts", {"norm_topk_prob": flag})
        parts = {
            "moe_head_layer": "the head layer",
            "moe_merge_layer": "the merge layer",
            "shared_expert_intermediate_size": "the shared expert",
            "moe_projection_bias": "the bias of head and merge layer",
        }
        for key, part in parts.items():
            if getattr(config, key):
                yield Change(f"{part} is left out", {key: type(getattr(config, key))(0)})
        if config.moe_head_layer and config.moe_merge_layer:
            yield Change(
                "the head layer and the merge layer are left out",
                {"moe_head_layer": False, "moe_merge_layer": False},
            )
        residual = "not added" if config.moe_residual else "added"
        yield Change(
            f"sub-tokens are {residual} to their experts' output",
            {"moe_residual": not config.moe_residual},
        )
        if config.moe_capacity_factor is not None:
            yield Change("no choice is dropped over capacity", {"moe_capacity_factor": None})
    if config.use_sub_norm:
        yield Change("the sub-norms are left out", {"use_sub_norm": False})
    other = "relu2" if config.hidden_act == "silu" else "silu"
    yield Change(f"the activation is {other}", {"hidden_act": other})


def quantised_elsewhere(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """What is quantised, and how."""
    if not config.is_quantised:
        return
    yield Change("nothing is quantised", {"quantization": "none"})
    if config.moe_head_layer or config.moe_merge_layer:
        flag = not config.quantize_moe_projections
        yield Change(
            f"head and merge layer are {'' if flag else 'not '}quantised",
            {"quantize_moe_projections": flag},
        )


# ---- positions and attention -----------------------------------------------------------------


def interleaved_rotation(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Feature 2j turned with 2j + 1: the rotate-half form of rows in another order.

    Scores do not change when q and k are permuted alike.
    """
    order = np.arange(config.head_dim).reshape(-1, 2).T.ravel()  # even features, then odd ones
    permuted = {}
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        rows = np.arange(len(tensors[name])).reshape(-1, config.head_dim)[:, order].ravel()
        permuted[name] = tensors[name][rows]
    yield Change("rotary positions turn interleaved pairs (2j, 2j+1), not halves", tensors=permuted)
    yield Change("positions are not rotated", operations=_NotRotated)
    yield Change("positions are rotated the opposite way", operations=_RotatedBack)


def another_scale(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """What the scores are divided by."""
    yield Change("the scale 1/sqrt(C) of the scores is missing", operations=_NotScaled)
    yield Change("scores are scaled by 1/C and not 1/sqrt(C)", operations=_ScaledTwice)


def key_heads_in_turn(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """Attention head a reads key/value head a mod G: as ours with attention heads in other places."""
    A, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if G in (1, A):
        return
    heads = np.arange(A).reshape(-1, G).T.ravel()  # those that read head 0, then 1, ...
    features = (heads[:, None] * C + np.arange(C)).ravel()
    moved = {
        "self_attn.q_proj.weight": tensors["self_attn.q_proj.weight"][features],
        "self_attn.o_proj.weight": tensors["self_attn.o_proj.weight"][:, features],
    }
    if "self_attn.attn_sub_norm.weight" in tensors:
        moved["self_attn.attn_sub_norm.weight"] = tensors["self_attn.attn_sub_norm.weight"][features]
    yield Change("attention head a reads key/value head a mod G, not a // (A/G)", tensors=moved)


class _NotRotated(Given):
    """Without positions."""

    def rotate_in_place(
        self, x_BTAC: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray | None
    ) -> None:
        """Leave x as it is."""


class _RotatedBack(Given):
    """By the opposite angle."""

    def rotate_in_place(
        self, x_BTAC: FloatArray, cos_YJ: FloatArray, sin_YJ: FloatArray, first_1: IntArray | None
    ) -> None:
        """See `Operations.rotate_in_place`."""
        self._ops.rotate_in_place(x_BTAC, cos_YJ, -sin_YJ, first_1)


class _NotScaled(Given):
    """softmax(q k^T) v."""

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.attention`."""
        return self._ops.attention(
            q_BTAC * q_BTAC.dtype.type(math.sqrt(q_BTAC.shape[3])), k_BSGC, v_BSGC
        )


class _ScaledTwice(Given):
    """softmax(q k^T / C) v."""

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.attention`."""
        return self._ops.attention(
            q_BTAC / q_BTAC.dtype.type(math.sqrt(q_BTAC.shape[3])), k_BSGC, v_BSGC
        )


# ---- the order of head, merge and gate ---------------------------------------------------------


def merge_before_the_gate(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """The merge layer on what each choice's experts return, and the gates afterwards."""
    if not (config.num_experts and config.moe_merge_layer):
        return
    yield Change("the merge layer is applied before the gates", operations=_MergedFirst)
    merge = tensors["mlp.merge_proj.weight"]
    if config.moe_head_layer and not config.moe_projection_bias:
        yield Change(
            "the merge layer is applied before the router and the experts",
            {"moe_merge_layer": False},
            {"mlp.head_proj.weight": merge @ tensors["mlp.head_proj.weight"]},
        )


class _MergedFirst(Given):
    """y = sum_j gate_j * merge(Expert_j(x)): the gates, one for each sub-token, come last.

    A sub-token's residual, where there is one, is added to that sum.
    """

    _choices: tuple[list[FloatArray], FloatArray, FloatArray, FloatArray] | None = None

    def expert_ffn(
        self,
        x_MU: FloatArray,
        gate_MK: FloatArray,
        dispatch: Dispatch,
        *weights: Any,
        **options: Any,
    ) -> tuple[FloatArray, ExpertCache]:
        """See `Operations.expert_ffn`; what each choice returns without its gate is kept."""
        choices = []
        for j in range(gate_MK.shape[1]):
            alone_MK = np.zeros_like(gate_MK)
            alone_MK[:, j] = 1
            choices.append(super().expert_ffn(x_MU, alone_MK, dispatch, *weights, **options)[0])
        y_MU, cache = super().expert_ffn(x_MU, gate_MK, dispatch, *weights, **options)
        self._choices = choices, gate_MK, y_MU, y_MU.copy()
        return y_MU, cache

    def linear(self, x_NI: FloatArray, w_OI: Weight, b_O: FloatArray | None) -> FloatArray:
        """See `Operations.linear`; of the experts' output: each choice by itself, then the gates."""
        if self._choices is None or not np.shares_memory(x_NI, self._choices[2]):
            return super().linear(x_NI, w_OI, b_O)
        choices, gate_MK, y_MU, experts_MU = self._choices
        merged_MU = y_MU - experts_MU
        for j, choice_MU in enumerate(choices):
            merged_NI = super().linear(choice_MU.reshape(x_NI.shape), w_OI, b_O)
            merged_MU += gate_MK[:, j, None] * merged_NI.reshape(y_MU.shape)
        return merged_MU.reshape(x_NI.shape)


# ---- gates and quantisers ----------------------------------------------------------------------


def another_gate(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """What the experts' outputs are multiplied by."""
    if config.num_experts:
        yield Change("experts are summed without gates", operations=_NoGates)


class _NoGates(Given):
    """Every gate 1."""

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """See `Operations.route`."""
        routing = super().route(logits_ME, top_k=top_k, normalise=normalise)
        return routing._replace(gate_MK=np.ones_like(routing.gate_MK))


def half_away_from_zero(config: ModelConfig, tensors: Tensors) -> Iterator[Change]:
    """The quantisers' rounding, which is to even where it lies half-way."""
    if config.is_quantised:
        yield Change("the quantisers round halves away from zero, not to even", operations=_HalfAway)


class _HalfAway(Given):
    """sign(t) * floor(|t| + 1/2) in the place of rint(t)."""

    def decided(self, x_NI: FloatArray, token_N: IntArray, weight: str) -> FloatArray:
        """See `Given.decided`: an x that quantises to these integers."""
        _, scale_N = self._ops.quantise_rows(x_NI)
        gamma_N1 = np.maximum(np.abs(x_NI).max(axis=1, initial=0, keepdims=True), x_NI.dtype.type(1e-5))
        product_NI = x_NI * (x_NI.dtype.type(127) / gamma_N1)
        away_NI = np.sign(product_NI) * np.floor(np.abs(product_NI) + x_NI.dtype.type(0.5))
        tied_NI = np.abs(product_NI - np.trunc(product_NI)) == 0.5
        return np.where(tied_NI, away_NI * scale_N[:, None], x_NI)

    def quantise_weight(
        self,
        w_OI: FloatArray,
        starts: tuple[int, ...],
        *,
        quantization: Quantization,
        q_OI: FloatArray,
        beta_O: FloatArray,
        report_X5: FloatArray,
    ) -> None:
        """See `Operations.quantise_weight`."""
        self._ops.quantise_weight(
            w_OI, starts, quantization=quantization, q_OI=q_OI, beta_O=beta_O, report_X5=report_X5
        )
        if quantization == "bitnet_b158":
            tied_OI = np.abs(w_OI * (1 / beta_O[:, None])) == 0.5
            q_OI[tied_OI] = np.sign(w_OI[tied_OI])


HYPOTHESES: list[Hypothesis] = [
    transposed,
    gate_and_up_exchanged,
    interleaved_rotation,
    another_scale,
    another_epsilon,
    another_theta,
    a_part_left_out,
    another_gate,
    heads_interleaved,
    merge_before_the_gate,
    key_heads_in_turn,
    left_out_or_doubled,
    quantised_elsewhere,
    experts_in_another_order,
]
"""The cheaper and likelier first: the first that explains the numbers is the cause, and of its changes
the one that comes nearest.

`half_away_from_zero` is not among them: it comes before ties are looked at.
"""
