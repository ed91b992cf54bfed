"""Each operation of a trace, computed from its own operands there.

Only what the trace has is computed: a result is held against what its operands give, and nothing that
was wrong before it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.audit.operands import module_of, quantised_part
from mhmoe_np.comparison.difference import Tensor
from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Entry, Parameters, Part
from mhmoe_np.operations.table import BitWeight, Operations, Weight


class Step(NamedTuple):
    """One operation: a result's name, its operands' names, and how it comes of them."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., Tensor]


def operations_from(
    theirs: Trace, model: Model, parameters: Parameters, *, sequences: int, ops: Operations
) -> Trace:
    """Every result in the trace whose operands are there, too; what does not fit is left out."""
    ours: Trace = {}
    for step in _steps(model, parameters, sequences, ops=ops):
        if step.result in theirs and all(name in theirs for name in step.operands):
            operands = [_rows(theirs[name], model.weights.dtype) for name in step.operands]
            try:
                ours[step.result] = np.asarray(step.compute(*operands))
            except ValueError:  # operands of shapes that do not go together
                continue
    return ours


def _rows(tensor: Tensor, dtype: Any) -> Tensor:
    """Floats in the model's dtype, tokens as rows."""
    if tensor.ndim > 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    wanted = dtype if tensor.dtype.kind == "f" else np.int64
    return np.asarray(tensor, wanted, order="C")


def _steps(model: Model, parameters: Parameters, sequences: int, *, ops: Operations) -> Iterator[Step]:
    config = model.config
    embedding_VD = model.weights.embedding_VD
    yield Step(
        "embed_tokens.output",
        ("input_ids",),
        lambda ids: ops.embedding(np.maximum(ids, 0).ravel(), embedding_VD),
    )
    for entry in parameters.table:
        for part in entry.parts:
            if part.tensor.endswith("norm.weight"):
                yield _norm(part, parameters, config.rms_norm_eps, ops=ops)
            elif part.tensor.endswith(("_proj.weight", "mlp.gate.weight")):
                yield from _linear(entry, part, model, parameters, ops=ops)
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        yield from _attention(layer, model, sequences, ops=ops)
        networks = [f"{layer}.mlp"]
        if config.is_moe_layer(number):
            networks = [f"{layer}.mlp.experts.{e}" for e in range(config.num_experts)]
            networks.append(f"{layer}.mlp.shared_expert")
            yield from _router(layer, model, ops=ops)
        for network in networks:
            yield from _feed_forward(network, model, ops=ops)


def _norm(part: Part, parameters: Parameters, eps: float, *, ops: Operations) -> Step:
    module, w_D = module_of(part.tensor), np.ascontiguousarray(parameters.tensors[part.tensor])
    return Step(f"{module}.output", (f"{module}.input",), lambda x: ops.rms_norm(x, w_D, eps=eps)[0])


def _linear(
    entry: Entry, part: Part, model: Model, parameters: Parameters, *, ops: Operations
) -> Iterator[Step]:
    """A linear map; a BitLinear by its integers there, where they are, so that ties do not matter."""
    module = module_of(part.tensor)
    bias = parameters.tensors.get(f"model.{module}.bias")
    quantised = quantised_part(model.weights.arrays[entry.name], entry, part, ops=ops)
    if quantised is None:
        w_OI: Weight = np.ascontiguousarray(parameters.tensors[part.tensor])
        yield Step(f"{module}.output", (f"{module}.input",), lambda x: ops.linear(x, w_OI, bias))
        return
    dtype = model.weights.dtype
    integers, beta = quantised.integers.astype(dtype), dtype.type(quantised.beta)
    bit = BitWeight(integers, np.full(len(integers), beta, dtype))
    yield Step(f"{module}.weight_integers", (), lambda: quantised.integers)
    yield Step(f"{module}.weight_scale", (), lambda: beta)
    yield Step(
        f"{module}.input_integers",
        (f"{module}.input",),
        lambda x: ops.quantise_rows(x)[0].astype(np.int8),
    )
    yield Step(f"{module}.input_scale", (f"{module}.input",), lambda x: ops.quantise_rows(x)[1])
    yield Step(f"{module}.output", (f"{module}.input",), lambda x: ops.linear(x, bit, bias))

    def of_integers(q_NI: Tensor, scale: Tensor) -> Tensor:
        y_NO = (q_NI.astype(dtype) @ integers.T) * (beta * scale.reshape(-1, 1))
        return y_NO if bias is None else y_NO + bias

    yield Step(f"{module}.output", (f"{module}.input_integers", f"{module}.input_scale"), of_integers)


def _attention(layer: str, model: Model, sequences: int, *, ops: Operations) -> Iterator[Step]:
    attention, C = f"{layer}.self_attn", model.config.head_dim

    def rotated(x: Tensor) -> Tensor:
        turned = x.reshape(sequences, -1, x.shape[1] // C, C).copy()
        ops.rotate_in_place(turned, model.rotary.cos_YJ, model.rotary.sin_YJ, None)
        return turned.reshape(x.shape)

    def attended(*heads: Tensor) -> Tensor:
        q, k, v = (x.reshape(sequences, -1, x.shape[1] // C, C) for x in heads)
        return ops.attention(q, k, v)[0].reshape(len(heads[0]), -1)

    yield Step(f"{attention}.q_rotated", (f"{attention}.q_proj.output",), rotated)
    yield Step(f"{attention}.k_rotated", (f"{attention}.k_proj.output",), rotated)
    operands = (f"{attention}.q_rotated", f"{attention}.k_rotated", f"{attention}.v_proj.output")
    for result in ("attention.output", "attn_sub_norm.input", "o_proj.input"):
        if result != "o_proj.input" or not model.config.use_sub_norm:
            yield Step(f"{attention}.{result}", operands, attended)
    yield Step(
        f"{layer}.post_attention_layernorm.input",
        (f"{layer}.input_layernorm.input", f"{attention}.o_proj.output"),
        np.add,
    )


def _feed_forward(network: str, model: Model, *, ops: Operations) -> Iterator[Step]:
    def activated(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated_activation(
            np.concatenate([gate, up], axis=1), activation=model.config.hidden_act
        )

    result = "ffn_sub_norm.input" if model.config.use_sub_norm else "down_proj.input"
    operands = (f"{network}.gate_proj.output", f"{network}.up_proj.output")
    yield Step(f"{network}.{result}", operands, activated)


def _router(layer: str, model: Model, *, ops: Operations) -> Iterator[Step]:
    gate, config = f"{layer}.mlp.gate", model.config

    def probabilities(logits: Tensor) -> Tensor:
        return ops.route(logits, top_k=1, normalise=False).p_ME

    def gates(logits: Tensor, experts: Tensor) -> Tensor:
        chosen = np.take_along_axis(probabilities(logits), experts, axis=1)
        return chosen / chosen.sum(axis=1, keepdims=True) if config.norm_topk_prob else chosen

    yield Step(f"{gate}.probabilities", (f"{layer}.router_logits",), probabilities)
    yield Step(f"{gate}.gates", (f"{layer}.router_logits", f"{layer}.experts"), gates)
    if config.moe_merge_layer and not config.moe_residual:
        yield Step(
            f"{layer}.mlp.merge_proj.input",
            (f"{layer}.mlp.experts.output",),
            lambda y: y.reshape(-1, config.hidden_size),
        )
