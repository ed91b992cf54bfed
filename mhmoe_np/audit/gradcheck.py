"""Every hand-derived gradient against central differences in float64, along random directions.

For y = f(x), a random upstream gradient dy and a random direction v, <dx, v> must equal the
derivative of <dy, f(x + t v)> at t = 0. Ones are never used as dy: a softmax's rows sum to 1, so its
gradient under ones is 0 and hides errors. The derivative is taken by the fourth-order central
stencil (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, with h made smaller until two in a row agree:
a norm of small numbers curves strongly, squared ReLU has kinks in its slope, and where the router's
choice switches there is no derivative at all.

A quantiser has none either: the straight-through gradients of quantised layers are compared with the
derivatives of the surrogate whose gradients they are (see `surrogate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from mhmoe_np.audit.host_facing import HostFacing
from mhmoe_np.audit.surrogate import ActingWeight, ChoiceSwitchedError, Surrogate, acting_weights
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache, Model
from mhmoe_np.model.loss import IGNORED, Batch, loss, loss_and_gradient
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.table import (
    Activation,
    BitWeight,
    Dispatch,
    Operations,
    Quantization,
    RouterLosses,
    Routing,
)
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import BoolArray, FloatArray

OPERATION_BOUND, MODEL_BOUND = 1e-7, 1e-6
FIRST_STEP, LAST_STEP = 4e-3, 1e-7
AGREEMENT = 1e-9  # of two steps in a row, relative
ACTIVATIONS: tuple[Activation, ...] = ("silu", "relu2")
DIRECTIONS = 3  # for each input of an operation; a model has one for each of its many tensors


class GradientCheck(NamedTuple):
    """The worst relative error over all inputs and directions, and what it must stay below."""

    name: str
    max_rel_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound (NaN is not)."""
        return self.max_rel_error <= self.bound


def derivative(f: Callable[[float], float]) -> float:
    """df/dt at 0 by the fourth-order central stencil, on the steps that agree best.

    The choice of the step looks at f alone and never at the gradient under test.
    """
    best, best_gap, previous = 0.0, np.inf, np.inf
    step = FIRST_STEP
    while step >= LAST_STEP and best_gap > AGREEMENT * abs(best):
        near, far = f(step) - f(-step), f(2 * step) - f(-2 * step)
        value = (8 * near - far) / (12 * step)
        gap = abs(value - previous)
        if gap < best_gap:
            best, best_gap = value, gap
        previous, step = value, step / 4
    return best


def relative_error(numeric: float, analytic: float) -> float:
    """|numeric - analytic| over the larger of the two; 0 where both are 0."""
    scale = max(abs(numeric), abs(analytic))
    return abs(numeric - analytic) / scale if scale else 0.0


Outputs = Sequence[FloatArray]


def check_operation(
    name: str,
    inputs: Sequence[FloatArray],
    run: Callable[..., Outputs],
    back: Callable[[Outputs], Outputs],
    rng: np.random.Generator,
) -> GradientCheck:
    """run(*inputs) gives the outputs; back(upstream gradients) the gradients of the inputs."""
    outputs = run(*inputs)
    upstream = [rng.standard_normal(y.shape) for y in outputs]
    gradients = back(upstream)
    worst = 0.0
    for i, x in enumerate(inputs):
        for _ in range(DIRECTIONS):
            v = rng.standard_normal(x.shape)

            def along(t: float, i: int = i, v: FloatArray = v) -> float:
                moved = [x + t * v if j == i else x for j, x in enumerate(inputs)]
                # Minus y(0): a constant changes no derivative and costs digits.
                return sum(
                    float(np.sum((y - y0) * dy))
                    for y, y0, dy in zip(run(*moved), outputs, upstream, strict=True)
                )

            numeric = derivative(along)
            worst = max(worst, relative_error(numeric, float(np.sum(gradients[i] * v))))
    return GradientCheck(name, worst, OPERATION_BOUND)


def _activate(ops: Operations, kind: Activation, gate_up: FloatArray) -> Outputs:
    return (ops.gated_activation(gate_up, activation=kind),)


def _activate_back(ops: Operations, kind: Activation, gate_up: FloatArray, dy: Outputs) -> Outputs:
    return (ops.gated_activation_backward(dy[0], gate_up, activation=kind),)


def _route_back(
    ops: Operations, routing: Routing, counted_M: BoolArray, normalise: bool, dy: Outputs
) -> Outputs:
    """Upstream of gates, balance loss and z-loss: aux = E sum_e (c_e / 12) mean p_e, z = mean lse^2."""
    losses = RouterLosses(ROUTER_COUNT_E, 12, 7, daux=float(dy[1][0]), dz=float(dy[2][0]))
    return (ops.route_backward(dy[0], routing, counted_M, losses, normalise=normalise),)


ROUTER_COUNT_E = np.array([3.0, 1.0, 0.0, 4.0, 2.0, 2.0])  # of 12 choices


def check_operations(backend: Operations) -> Iterator[GradientCheck]:
    """Every differentiable operation of the table."""
    ops = cast(Operations, HostFacing(backend))
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> FloatArray:
        return rng.standard_normal(shape)

    x, w, b = draw(7, 5), draw(6, 5), draw(6)

    def linear_back(dy: Outputs) -> Outputs:
        dw, db = np.zeros_like(w), np.zeros_like(b)
        return ops.linear_backward(dy[0], x, w, dw, db), dw, db

    yield check_operation("linear", (x, w, b), lambda x, w, b: (ops.linear(x, w, b),), linear_back, rng)

    ids, table = np.array([1, 4, 1, 0]), draw(5, 3)

    def embedding_back(dy: Outputs) -> Outputs:
        dtable = np.zeros_like(table)
        ops.embedding_backward(dy[0], ids, dtable)
        return (dtable,)

    yield check_operation(
        "embedding", (table,), lambda table: (ops.embedding(ids, table),), embedding_back, rng
    )

    scale = draw(5)

    def norm_back(dy: Outputs) -> Outputs:
        dscale = np.zeros_like(scale)
        rstd = ops.rms_norm(x, scale, eps=1e-5)[1]
        return ops.rms_norm_backward(dy[0], x, scale, rstd, dscale), dscale

    yield check_operation(
        "rms_norm",
        (x, scale),
        lambda x, scale: ops.rms_norm(x, scale, eps=1e-5)[:1],
        norm_back,
        rng,
    )

    heads, angle = draw(2, 3, 2, 4), draw(3, 2)

    def rotate(x: FloatArray, sign: int = 1) -> Outputs:
        y = x.copy()
        ops.rotate_in_place(y, np.cos(angle), sign * np.sin(angle))
        return (y,)

    yield check_operation("rotate", (heads,), rotate, lambda dy: rotate(dy[0], -1), rng)

    q, k, v = draw(2, 5, 4, 6), draw(2, 5, 2, 6), draw(2, 5, 2, 6)

    def attention_back(dy: Outputs) -> Outputs:
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        ops.attention_backward(dy[0], q, k, v, *ops.attention(q, k, v), dq, dk, dv)
        return dq, dk, dv

    yield check_operation(
        "attention", (q, k, v), lambda q, k, v: ops.attention(q, k, v)[:1], attention_back, rng
    )

    gate_up = draw(7, 8)
    for activation in ACTIVATIONS:
        yield check_operation(
            f"gated_activation[{activation}]",
            (gate_up,),
            partial(_activate, ops, activation),
            partial(_activate_back, ops, activation, gate_up),
            rng,
        )

    # Well separated logits: no step of the stencil changes which experts are the largest.
    logits = rng.permuted(np.tile(np.linspace(-1, 1, 6), (7, 1)), axis=1) + 0.01 * draw(7, 6)
    counted = np.ones(7, np.bool_)
    for normalise in (False, True):
        routing = ops.route(logits, top_k=2, normalise=normalise)

        def route(x: FloatArray, normalise: bool = normalise) -> Outputs:
            moved = ops.route(x, top_k=2, normalise=normalise)
            aux = 6 * np.sum(ROUTER_COUNT_E / 12 * moved.p_ME.mean(axis=0))
            z = np.mean(moved.log_sum_exp_M**2)
            return moved.gate_MK, np.array([aux]), np.array([z])

        yield check_operation(
            f"route[{'normalised' if normalise else 'raw'}]",
            (logits,),
            route,
            partial(_route_back, ops, routing, counted, normalise),
            rng,
        )

    sub_tokens, gate = draw(7, 4), draw(7, 2)
    experts = ops.route(logits, top_k=2, normalise=True).expert_MK
    dispatch = ops.dispatch(experts, experts=6, capacity=2)
    weights = draw(6, 6, 4), draw(6, 4, 3), draw(6, 3)
    for activation in ACTIVATIONS:
        for normed in (False, True):
            inputs = sub_tokens, gate, *weights[: 3 if normed else 2]

            def run(x: FloatArray, g: FloatArray, *w: FloatArray, kind: Activation = activation) -> Any:
                norm = w[2] if len(w) == 3 else None
                return ops.expert_ffn(x, g, dispatch, w[0], w[1], norm, activation=kind, eps=1e-5)

            def back(
                dy: Outputs,
                run: Callable[..., Any] = run,
                inputs: Outputs = inputs,
                kind: Activation = activation,
            ) -> Outputs:
                x, g, *w = inputs
                dw = [np.zeros_like(array) for array in w]
                norm, dnorm = (w[2], dw[2]) if len(w) == 3 else (None, None)
                cache = run(*inputs)[1]
                dx, dg = ops.expert_ffn_backward(
                    dy[0], x, g, dispatch, w[0], w[1], norm, cache, dw[0], dw[1], dnorm,
                    activation=kind,
                )  # fmt: skip
                return dx, dg, *dw

            name = f"expert_ffn[{activation}{', sub-norm' if normed else ''}, capacity]"
            yield check_operation(name, inputs, lambda *a, run=run: run(*a)[:1], back, rng)

    yield from check_quantised_operations(ops, rng)

    hidden, head = draw(6, 5), draw(9, 5)
    target = np.array([3, 0, IGNORED, 8, 3, 1])

    def nll_back(dy: Outputs) -> Outputs:
        dhead = np.zeros_like(head)
        _, dhidden = ops.token_nll_and_gradient(hidden, head, target, dhead, dnll=dy[0][0])
        return dhidden, dhead

    yield check_operation(
        "token_nll",
        (hidden, head),
        lambda x, w: (np.array([ops.token_nll(x, w, target).sum()]),),
        nll_back,
        rng,
    )


def _quantised(
    ops: Operations, w: FloatArray, matrix_rows: int, quantization: Quantization
) -> BitWeight:
    """Joined matrices of so many rows, each quantised with a beta of its own."""
    quantised = BitWeight(np.zeros_like(w), np.zeros(w.shape[:-1]))
    rows = math.prod(w.shape[:-1])
    starts = tuple(range(0, rows + 1, matrix_rows))
    ops.quantise_weight(
        w.reshape(rows, -1),
        starts,
        quantization=quantization,
        q_OI=quantised.w.reshape(rows, -1),
        beta_O=quantised.beta.reshape(-1),
        report_X5=np.zeros((len(starts) - 1, 5)),
    )
    return quantised


def check_quantised_operations(ops: Operations, rng: np.random.Generator) -> Iterator[GradientCheck]:
    """The linear map and the experts with BitNet's weights, against their surrogates."""
    quantizations: tuple[Quantization, ...] = ("bitnet_b158", "bitnet")
    x, w, b = rng.standard_normal((7, 5)), rng.standard_normal((6, 5)), rng.standard_normal(6)
    logits = rng.standard_normal((7, 6))
    sub_tokens, gate = rng.standard_normal((7, 4)), rng.standard_normal((7, 2))
    experts = ops.route(logits, top_k=2, normalise=True).expert_MK
    dispatch = ops.dispatch(experts, experts=6, capacity=2)
    stacks = rng.standard_normal((6, 6, 4)), rng.standard_normal((6, 4, 3))
    norm = rng.standard_normal((6, 3))
    for quantization in quantizations:
        # As in the model: a linear map may join matrices, an expert's first one joins gate and up.
        yield _check_bit_linear(ops, (x, w, b), _quantised(ops, w, 3, quantization), quantization, rng)
        weights = (
            _quantised(ops, stacks[0], 3, quantization),
            _quantised(ops, stacks[1], 4, quantization),
        )
        for activation in ACTIVATIONS:
            for inputs in ((sub_tokens, gate, *stacks), (sub_tokens, gate, *stacks, norm)):
                yield _check_bit_experts(ops, dispatch, inputs, weights, activation, quantization, rng)


def _check_bit_linear(
    ops: Operations,
    inputs: tuple[FloatArray, FloatArray, FloatArray],
    quantised: BitWeight,
    quantization: Quantization,
    rng: np.random.Generator,
) -> GradientCheck:
    x, w, b = inputs
    surrogate = Surrogate(ops)

    def run(moved_x: FloatArray, moved_w: FloatArray, moved_b: FloatArray) -> Outputs:
        surrogate.rewind()
        return (surrogate.linear(moved_x, ActingWeight.of(quantised, w, moved_w), moved_b),)

    def back(dy: Outputs) -> Outputs:
        dw, db = np.zeros_like(w), np.zeros_like(b)
        return ops.linear_backward(dy[0], x, quantised, dw, db), dw, db

    return check_operation(f"linear[{quantization}]", inputs, run, back, rng)


def _check_bit_experts(
    ops: Operations,
    dispatch: Dispatch,
    inputs: tuple[FloatArray, ...],
    quantised: tuple[BitWeight, BitWeight],
    activation: Activation,
    quantization: Quantization,
    rng: np.random.Generator,
) -> GradientCheck:
    x, gate, gate_up, down, *norms = inputs
    sub_norm = norms[0] if norms else None
    surrogate = Surrogate(ops)

    def run(
        x: FloatArray, gate: FloatArray, moved_in: FloatArray, moved_out: FloatArray, *norms: FloatArray
    ) -> Outputs:
        surrogate.rewind()
        acting_in = ActingWeight.of(quantised[0], gate_up, moved_in)
        acting_out = ActingWeight.of(quantised[1], down, moved_out)
        norm = norms[0] if norms else None
        y, _ = surrogate.expert_ffn(
            x, gate, dispatch, acting_in, acting_out, norm, activation=activation, eps=1e-5
        )
        return (y,)

    def back(dy: Outputs) -> Outputs:
        dw_in, dw_out = np.zeros_like(gate_up), np.zeros_like(down)
        dnorms = [np.zeros_like(norm) for norm in norms]
        _, cache = ops.expert_ffn(
            x, gate, dispatch, *quantised, sub_norm, activation=activation, eps=1e-5
        )
        dx, dgate = ops.expert_ffn_backward(
            dy[0], x, gate, dispatch, *quantised, sub_norm, cache,
            dw_in, dw_out, dnorms[0] if dnorms else None, activation=activation,
        )  # fmt: skip
        return dx, dgate, dw_in, dw_out, *dnorms

    kind = f"{quantization}, {activation}{', sub-norm' if norms else ''}, capacity"
    return check_operation(f"expert_ffn[{kind}]", inputs, run, back, rng)


_BASE = {
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 8,
    "router_aux_loss_coef": 0.1,
}
_SMOE = {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 7}
_FINE = {**_SMOE, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_MH2 = {**_FINE, "moe_heads": 2}
_TERNARY, _SIGN = {"quantization": "bitnet_b158"}, {"quantization": "bitnet"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, grouped heads, relu2, sub-norm, untied": {
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "relu2",
        "use_sub_norm": True,
        "tie_word_embeddings": False,
    },
    "smoe": {**_SMOE, "decoder_sparse_step": 1},
    "smoe, head and merge layer": {**_SMOE, "moe_head_layer": True, "moe_merge_layer": True},
    "fine-grained-smoe": _FINE,
    "mh-moe-2": _MH2,
    "mh-moe-3": {**_FINE, "moe_heads": 3, "num_experts_per_tok": 3},
    "mh-moe-2, projection bias": {**_MH2, "moe_projection_bias": True},
    "mh-moe-2, raw gates": {**_MH2, "norm_topk_prob": False},
    "mh-moe-2, no head layer": {**_MH2, "moe_head_layer": False},
    "mh-moe-2, no merge layer": {**_MH2, "moe_merge_layer": False},
    "mh-moe-2, neither": {**_MH2, "moe_head_layer": False, "moe_merge_layer": False},
    "mh-moe-2, shared expert": {**_MH2, "shared_expert_intermediate_size": 6},
    "mh-moe-2, sub-norm": {**_MH2, "shared_expert_intermediate_size": 6, "use_sub_norm": True},
    "mh-moe-2, capacity": {**_MH2, "moe_capacity_factor": 0.6},
    "mh-moe-2, balance over all choices": {**_MH2, "router_aux_loss_type": "topk"},
    "mh-moe-2, z-loss": {**_MH2, "router_z_loss_coef": 0.1},
    "dense, ternary": _TERNARY,
    "dense, sign, grouped heads, relu2": {**_SIGN, "num_key_value_heads": 1, "hidden_act": "relu2"},
    "smoe, ternary": {**_SMOE, **_TERNARY, "decoder_sparse_step": 1},
    "fine-grained-smoe, ternary": {**_FINE, **_TERNARY},
    "fine-grained-smoe, sign, grouped heads": {**_FINE, **_SIGN, "num_key_value_heads": 1},
    "mh-moe-2, ternary": {**_MH2, **_TERNARY},
    "mh-moe-2, sign": {**_MH2, **_SIGN},
    "mh-moe-2, ternary, no sub-norm": {**_MH2, **_TERNARY, "use_sub_norm": False},
    "mh-moe-2, sign, projections too": {
        **_MH2,
        **_SIGN,
        "quantize_moe_projections": True,
        "moe_projection_bias": True,
    },
    "mh-moe-3, ternary, shared expert, capacity": {
        **_FINE,
        **_TERNARY,
        "moe_heads": 3,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 6,
        "moe_capacity_factor": 0.6,
    },
}
"""Small models of every kind; all batches have padding."""


def check_model(name: str, settings: dict[str, Any], ops: Operations) -> GradientCheck:
    """Every tensor's gradient of the whole loss, each along a direction of its own."""
    rng = np.random.default_rng(1)
    config = ModelConfig.model_validate({**_BASE, **settings})
    parameters = Parameters(config, np.float64)
    initialise(parameters, seed=0)
    device_parameters = parameters.to_device(ops)
    device_gradient = device_parameters.zeros_like(ops=ops)
    tokens = rng.integers(0, config.vocab_size, (2, 8))
    target_BT = tokens[:, 1:].copy()
    target_BT[1, 4:] = IGNORED
    batch = Batch(np.ascontiguousarray(tokens[:, :-1]), target_BT)
    device_model = Model.of(device_parameters, ops=ops)
    loss_and_gradient(device_model, device_gradient, [batch], ops=ops)
    gradient = device_gradient.to_host(ops)

    at = Parameters(config, np.float64)
    at.flat_P[...] = parameters.flat_P
    surrogate = Surrogate(ops)
    model = Model.of(parameters, ops=cast(Operations, surrogate))

    def loss_and_choice() -> tuple[float, bytes]:
        """Of the parameters as they are now; without quantised ones the surrogate is the model."""
        surrogate.rewind()
        acting = model._replace(weights=acting_weights(model.weights, at, parameters))
        try:
            return _loss_and_choice(acting, batch, cast(Operations, surrogate))
        except ChoiceSwitchedError:
            return np.nan, b""

    origin = loss_and_choice()
    worst = 0.0
    for tensor_name, tensor in parameters.tensors.items():
        start, v = tensor.copy(), rng.standard_normal(tensor.shape)

        def along(
            t: float, tensor: FloatArray = tensor, start: FloatArray = start, v: FloatArray = v
        ) -> float:
            tensor[...] = start + t * v
            value, choice = loss_and_choice()
            # A step across a switch of the choice must not agree with any other.
            return value - origin[0] if choice == origin[1] else np.nan

        numeric = derivative(along)
        tensor[...] = start
        analytic = float(np.sum(gradient.tensors[tensor_name] * v))
        worst = max(worst, relative_error(numeric, analytic))
    return GradientCheck(f"model: {name}", worst, MODEL_BOUND)


def _loss_and_choice(model: Model, batch: Batch, ops: Operations) -> tuple[float, bytes]:
    choices: list[bytes] = []

    def note(_: FloatArray, cache: ForwardCache) -> None:
        choices.extend(
            block.feed_forward.routing.expert_MK.tobytes()
            for block in cache.blocks
            if isinstance(block.feed_forward, MoeCache)
        )

    return loss(model, [batch], watch=note, ops=ops).losses.loss, b"".join(choices)


def check_all(ops: Operations) -> Iterator[GradientCheck]:
    """Every operation, then every model."""
    yield from check_operations(ops)
    for name, settings in MODELS.items():
        yield check_model(name, settings, ops)
