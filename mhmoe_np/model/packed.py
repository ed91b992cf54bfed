"""Packed weights of a whole model: from float parameters, and back to floats.

A BitNet model's integers take 1, 1.6 or 2 bits and give its own outputs. Any model's weights can be
rounded to 8 bits (`pack_int8`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import Weights, floats, holds_int8, matrix_starts, quantised_anew
from mhmoe_np.operations.int8 import INT8, LARGEST_WEIGHT, Int8Weight, from_int8, to_int8
from mhmoe_np.operations.packing import FormatName, unpack
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight, Weight
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray


def pack_weights(
    parameters: Parameters,
    format: FormatName,
    *,
    ops: Operations,
    on_progress: OnProgress = unseen,
) -> Weights:
    """Quantise and pack the backend's parameters; what is not quantised stays as views of them.

    on_progress: counts parameters.

    Source   [spec 5 packed weights]
    """
    weights = quantised_anew(parameters, packed=False, ops=ops, on_progress=on_progress)
    arrays: dict[str, Weight] = {}
    packed_so_far = counting(on_progress, "packing", parameters.count)
    for name, weight in weights.arrays.items():
        if isinstance(weight, BitWeight):
            q_EOI = weight.w.reshape(-1, *weight.w.shape[-2:])
            experts, outputs, inputs = q_EOI.shape
            packed = ops.empty_packed(experts, outputs, inputs, format)
            ops.pack_in_place(q_EOI, packed)
            arrays[name] = PackedWeight(packed, weight.beta.reshape(q_EOI.shape[:2]))
        else:
            arrays[name] = weight
        packed_so_far(parameters.arrays[name].size)
    return Weights(parameters.config, arrays)


def pack_int8(parameters: Parameters, *, ops: Operations, on_progress: OnProgress = unseen) -> Weights:
    """The host's parameters in 8 bits, on the host; the others stay as views of them.

    Of a BitNet model it is what its weights act as, beta * w, that is kept.

    on_progress: counts parameters.

    Raises   UserError: a weight is too large for the scales.
    Source   [spec 5 8-bit weights]
    """
    config = parameters.config
    weights = Weights(config, parameters.arrays)
    if config.is_quantised:
        weights = quantised_anew(
            parameters.to_device(ops), packed=False, ops=ops, on_progress=on_progress
        ).to_host(ops)
    arrays: dict[str, Weight] = {}
    packed_so_far = counting(on_progress, "packing", parameters.count)
    for entry in parameters.table:
        weight = weights.arrays[entry.name]
        if isinstance(weight, BitWeight):
            weight = weight.w * weight.beta[..., None]
        if holds_int8(entry):
            try:
                weight = to_int8(floats(weight).reshape(-1, *entry.shape[-2:]))
            except ValueError:
                raise UserError(
                    f"{entry.name}: has weights beyond {LARGEST_WEIGHT:,.0f}, for which float16 has no "
                    "scale; such a model cannot be packed to int8"
                ) from None
        arrays[entry.name] = weight
        packed_so_far(parameters.arrays[entry.name].size)
    return Weights(config, arrays)


def packed_format(weights: Weights) -> FormatName | Literal["int8"]:
    """The format of packed weights: one for all of them.

    Source   [spec 5 packed weights]
    """
    for weight in weights.arrays.values():
        if isinstance(weight, PackedWeight):
            return weight.w.format
    return INT8


def unpack_int8(
    config: ModelConfig, weights: Weights, *, ops: Operations, on_progress: OnProgress = unseen
) -> Parameters:
    """Float32 parameters, on the host, that are what these act as; packed they are the same again.

    on_progress: counts parameters.

    Raises   UserError: it is a BitNet model, which quantises its floats in its own way.
    Source   [spec 5 8-bit weights]
    """
    if config.is_quantised:
        raise UserError(
            f"quantization is {config.quantization!r} and the weights are int8: no float weights of a "
            "BitNet model act like these; unpack what it was packed from"
        )
    weights = weights.to_host(ops)
    parameters = Parameters(config, np.float32)
    unpacked = counting(on_progress, "unpacking", parameters.count)
    for name, target in parameters.arrays.items():
        weight = weights.arrays[name]
        target[...] = (
            from_int8(weight).reshape(target.shape)
            if isinstance(weight, Int8Weight)
            else floats(weight)
        )
        unpacked(target.size)
    return parameters


def unpack_weights(
    config: ModelConfig, weights: Weights, *, ops: Operations, on_progress: OnProgress = unseen
) -> Parameters:
    """Float32 parameters, on the host, that are the same model: quantised they give these weights.

    The weights that once were trained are gone. In their place stand -m, 0 and m with m such that
    mean|W| is the scale beta again (m = beta over the share that is not 0), or -beta and beta.

    on_progress: counts parameters.

    Raises   UserError: no floats quantise to these weights, so no checkpoint was packed into them.
    Source   [D11]
    """
    weights = weights.to_host(ops)
    parameters = Parameters(config, np.float32)
    unpacked = counting(on_progress, "unpacking", parameters.count)
    for entry in parameters.table:
        weight, target = weights.arrays[entry.name], parameters.arrays[entry.name]
        if isinstance(weight, PackedWeight):
            q_OI = unpack(weight.w).reshape(-1, entry.shape[-1]).astype(np.float32)
            beta_O = weight.beta.ravel()
            target_OI = target.reshape(q_OI.shape)
            for first, last in pairwise(matrix_starts(entry)):
                target_OI[first:last] = floats_of(q_OI[first:last], beta_O[first])
        else:
            target[...] = floats(weight)
        unpacked(target.size)
    again = quantised_anew(
        parameters.to_device(ops),
        packed=False,
        ops=ops,
        on_progress=lambda _stage, done, total: on_progress("checking", done, total),
    ).to_host(ops)
    for entry in parameters.table:
        weight, quantised = weights.arrays[entry.name], again.arrays[entry.name]
        if isinstance(weight, PackedWeight) and isinstance(quantised, BitWeight):
            same = np.array_equal(unpack(weight.w).ravel(), quantised.w.ravel())
            if not same or not np.array_equal(weight.beta.ravel(), quantised.beta.ravel()):
                raise UserError(f"{entry.name}: no float weights quantise to what is packed here")
    return parameters


def floats_of(q_OI: FloatArray, beta: np.float32) -> FloatArray:
    """Float32 weights of one matrix whose exact mean magnitude rounds to beta and whose signs are q's.

    One magnitude m for all that is not 0 leaves |mean - beta| up to half a step of m, which may be a
    whole step of beta. Where it rounds to another float, some weights take the next float above m, and
    one that stands for 0 the small rest.

    Shapes   q_OI -> w_OI
    Source   [D11]
    """
    used = q_OI != 0
    count = int(np.count_nonzero(used))
    if count == 0:
        return q_OI
    wanted = float(beta) * q_OI.size  # exact: 24 bits times the size
    m = np.float32(wanted / count)
    if np.float32(float(m) * count / q_OI.size) == beta:
        return q_OI * m
    if float(m) * count > wanted:
        m = np.nextafter(m, np.float32(0))
    step = float(np.nextafter(m, np.float32(np.inf))) - float(m)
    raised, rest = divmod(wanted - float(m) * count, step)
    w_OI = q_OI * m
    w_OI[used] += (q_OI[used] * np.float32(step)) * (np.arange(count) < raised)
    if count < q_OI.size:
        w_OI.ravel()[np.flatnonzero(~used)[0]] = rest
    return w_OI
