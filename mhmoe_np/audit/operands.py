"""Operands and results of each operation of a forward, under names that other implementations can make.

A name is the module's place, as in the parameters' names, then `input` or `output`: what a hook on that
module sees. Joined projections are taken apart. An expert's rows are its sub-tokens, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhmoe_np.layers.moe import DOWN, GATE_UP, SUB_NORM
from mhmoe_np.model.parameters import Entry, Part
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.packing import unpack
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight, Weight
from mhmoe_np.settings.model import ModelConfig

Tensor = NDArray[Any]
Named = Iterator[tuple[str, Tensor]]


class Call(NamedTuple):
    """One call of an operation, as the door sees it."""

    operation: str
    arguments: Mapping[str, Any]
    results: Sequence[Any]
    entry: Entry | None  # of its weight
    layer: str  # "layers.3"


def module_of(tensor: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `layers.0.self_attn.q_proj`."""
    return tensor.removeprefix("model.").rpartition(".")[0]


def operands_of(
    call: Call, table: Mapping[str, Entry], config: ModelConfig, *, ops: Operations
) -> Named:
    """What one call of a forward was given and returned, on the host.

    table: the model's arrays by name.
    """
    operation, arguments, results, entry, layer = call
    if operation == "embedding":
        yield "embed_tokens.output", ops.to_host(results[0])
    elif entry is not None and operation in ("rms_norm", "add_in_place_and_norm"):
        x_ND = arguments["x_ND" if operation == "rms_norm" else "branch_ND"]
        yield f"{module_of(entry.name)}.input", ops.to_host(x_ND)
        yield f"{module_of(entry.name)}.output", ops.to_host(results[0])
    elif entry is not None and operation == "linear":
        y_NO = ops.to_host(results[0])
        for part in entry.parts:
            yield from _of_linear(
                part,
                ops.to_host(arguments["x_NI"]),
                y_NO[:, part.where[0]] if part.where else y_NO,
                quantised_part(arguments["w_OI"], entry, part, ops=ops),
            )
    elif operation == "rotate_in_place":
        x_BTAC = ops.to_host(arguments["x_BTAC"])
        A, N = config.num_attention_heads, x_BTAC.shape[0] * x_BTAC.shape[1]
        yield f"{layer}.self_attn.q_rotated", x_BTAC[:, :, :A].reshape(N, -1)
        yield f"{layer}.self_attn.k_rotated", x_BTAC[:, :, A:].reshape(N, -1)
    elif operation == "attention":
        out_BTAC = ops.to_host(results[0])
        width = config.num_attention_heads * config.head_dim
        yield f"{layer}.self_attn.attention.output", out_BTAC.reshape(-1, width)
    elif operation == "route":
        yield f"{layer}.mlp.gate.probabilities", ops.to_host(results[0])
        yield f"{layer}.mlp.gate.gates", ops.to_host(results[3])
    elif operation == "expert_ffn":
        entries = {name: table.get(f"model.{layer}.{name}") for name in (GATE_UP, DOWN, SUB_NORM)}
        yield from _of_experts(call, entries, config, ops=ops)


class Quantised(NamedTuple):
    """One matrix of a BitLinear."""

    integers: Tensor  # [O, I] or, of one expert's, the same
    beta: float


def quantised_part(weight: Weight, entry: Entry, part: Part, *, ops: Operations) -> Quantised | None:
    """A matrix's integers and scale, on the host; None: it is not quantised."""
    if not isinstance(weight, BitWeight | PackedWeight):
        return None
    if isinstance(weight, PackedWeight):
        whole = unpack(ops.packed_to_host(weight.w))
    else:
        whole = ops.to_host(weight.w)
    beta = ops.to_host(weight.beta).reshape(entry.shape[:-1])
    return Quantised(
        whole.reshape(entry.shape)[part.where].astype(np.int8), beta[part.where].ravel()[0]
    )


def _of_linear(part: Part, x_NI: Tensor, y_NO: Tensor, quantised: Quantised | None) -> Named:
    """One linear map; of a BitLinear its integers and scales, too."""
    module = module_of(part.tensor)
    yield f"{module}.input", x_NI
    if quantised is not None:
        yield f"{module}.weight_integers", quantised.integers
        yield f"{module}.weight_scale", np.array(quantised.beta)
        q_NI, scale_N = load_operations("numpy").quantise_rows(np.ascontiguousarray(x_NI))
        yield f"{module}.input_integers", q_NI.astype(np.int8)
        yield f"{module}.input_scale", scale_N
    yield f"{module}.output", y_NO


def _of_experts(
    call: Call, entries: Mapping[str, Entry | None], config: ModelConfig, *, ops: Operations
) -> Named:
    """Expert by expert, its rows in the order of the sub-tokens.

    The operation returns what gate_proj and up_proj made; what it keeps to itself from there on is
    computed once more by the definitions.
    """
    definition = load_operations("numpy")
    arguments, y_MU, gate_up_R2F = call.arguments, call.results[0], ops.to_host(call.results[1])
    x_MU, K = ops.to_host(arguments["x_MU"]), arguments["gate_MK"].shape[1]
    route_R = ops.to_host(arguments["dispatch"].route_R)
    starts = ops.to_host(arguments["dispatch"].start_Z).tolist()
    gate_up, down, norm = entries[GATE_UP], entries[DOWN], entries[SUB_NORM]
    assert gate_up is not None
    assert down is not None
    for e, (first, last) in enumerate(pairwise(starts)):
        sub_token_R = route_R[first:last] // K
        order = np.argsort(sub_token_R)
        sub_token_R, act_R2F = sub_token_R[order], gate_up_R2F[first:last][order]
        yield f"{call.layer}.mlp.experts.{e}.sub_tokens", sub_token_R
        F = act_R2F.shape[1] // 2
        for part, y_RF in zip(gate_up.parts[2 * e :], (act_R2F[:, :F], act_R2F[:, F:]), strict=False):
            quantised = quantised_part(arguments["gate_up_E2FU"], gate_up, part, ops=ops)
            yield from _of_linear(part, x_MU[sub_token_R], y_RF, quantised)
        n_RF = definition.gated_activation(act_R2F, activation=config.hidden_act)
        if norm is not None:
            module = module_of(norm.parts[e].tensor)
            yield f"{module}.input", n_RF
            w_F = ops.to_host(arguments["sub_norm_EF"])[e]
            n_RF, _ = definition.rms_norm(n_RF, w_F, eps=config.rms_norm_eps)
            yield f"{module}.output", n_RF
        part = down.parts[e]
        quantised = quantised_part(arguments["down_EUF"], down, part, ops=ops)
        w_UF = arguments["down_EUF"]
        if isinstance(w_UF, Int8Weight):
            acting: Weight = w_UF.matrix(e)
        elif quantised is None:
            acting = ops.to_host(w_UF)[e]
        else:
            U = len(quantised.integers)
            acting = BitWeight(
                quantised.integers.astype(n_RF.dtype), np.full(U, quantised.beta, n_RF.dtype)
            )
        yield from _of_linear(part, n_RF, definition.linear(n_RF, acting, None), quantised)
    yield f"{call.layer}.mlp.experts.output", ops.to_host(y_MU)
