"""The weights as the forward uses them: floats, or BitNet's integers and scales.

Quantised once for each state of the parameters, not once for each use: whoever changes the parameters
calls `requantise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from mhmoe_np.model.parameters import Entry, Parameters, blocks_of, output_name
from mhmoe_np.operations.bfloat16 import BFloat16Weight
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.packing import FormatName
from mhmoe_np.operations.table import BitWeight, LayerWeights, Operations, PackedWeight, Weight
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


def formats_for(config: ModelConfig) -> list[FormatName]:
    """The formats that hold a model's quantised weights, the one to prefer first; none without such.

    Source   [spec 5 packed weights]
    """
    formats: dict[str, list[FormatName]] = {
        "none": [],
        "bitnet_b158": ["ternary-2bit", "ternary-base3"],
        "bitnet": ["sign-1bit"],
    }
    return formats[config.quantization]


class Weights:
    """Every array of the parameter table, in the form in which the forward reads it.

    Attributes:
        arrays: by the table's names.
        blocks: for each layer its arrays, by name without `model.layers.{i}.`.
        embedding_VD, final_norm_D, output_VD: those outside the layers, never quantised.
    """

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Weight]) -> None:
        self.config, self.arrays = config, arrays
        self.blocks: Sequence[LayerWeights] = blocks_of(arrays, config)
        self.embedding_VD = floats(arrays[EMBEDDING])
        self.final_norm_D = floats(arrays[FINAL_NORM])
        self.output_VD = floats(arrays[output_name(config)])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The float type of all that is computed."""
        return self.embedding_VD.dtype

    @classmethod
    def of(cls, parameters: Parameters, *, packed: bool, ops: Operations) -> Self:
        """Views of the backend's parameters; what is quantised gets arrays still to be filled.

        packed: whether these have their integers in packed form, too.
        """
        arrays: dict[str, Weight] = dict(parameters.arrays)
        dtype, formats = parameters.flat_P.dtype, formats_for(parameters.config)
        for entry in parameters.table:
            if entry.quantised:
                *experts, outputs, inputs = entry.shape
                arrays[entry.name] = BitWeight(
                    ops.zeros(entry.shape, dtype),
                    ops.zeros(entry.shape[:-1], dtype),
                    ops.empty_packed(math.prod(experts), outputs, inputs, formats[0])
                    if packed
                    else None,
                )
        return cls(parameters.config, arrays)

    def to_device(self, ops: Operations) -> Weights:
        """Floats and packed weights of the host as the backend's: themselves, or copies."""
        arrays: dict[str, Weight] = {}
        for name, weight in self.arrays.items():
            if isinstance(weight, PackedWeight):
                arrays[name] = PackedWeight(ops.packed_to_device(weight.w), ops.to_device(weight.beta))
            elif isinstance(weight, Int8Weight):
                arrays[name] = weight._replace(
                    q=ops.to_device(weight.q), scale=ops.to_device(weight.scale)
                )
            else:
                arrays[name] = ops.to_device(floats(weight))
        return Weights(self.config, arrays)

    def to_host(self, ops: Operations) -> Weights:
        """The backend's weights of any kind as the host's, packed ones in the layout of files."""
        arrays: dict[str, Weight] = {}
        for name, weight in self.arrays.items():
            if isinstance(weight, PackedWeight):
                arrays[name] = PackedWeight(ops.packed_to_host(weight.w), ops.to_host(weight.beta))
            elif isinstance(weight, Int8Weight):
                arrays[name] = weight._replace(q=ops.to_host(weight.q), scale=ops.to_host(weight.scale))
            elif isinstance(weight, BitWeight):
                packed = None if weight.packed is None else ops.packed_to_host(weight.packed)
                arrays[name] = BitWeight(ops.to_host(weight.w), ops.to_host(weight.beta), packed)
            else:
                arrays[name] = ops.to_host(weight)
        return Weights(self.config, arrays)


def floats(weight: Weight) -> FloatArray:
    """A weight that is not quantised.

    Shapes   -> the weight's own
    Source   [spec 5 never quantised]
    """
    assert not isinstance(weight, BitWeight | PackedWeight | Int8Weight | BFloat16Weight)
    return weight


def holds_int8(entry: Entry) -> bool:
    """Whether an entry is kept in 8 bits by `pack --format int8`: linear maps, the router's excepted.

    Source   [spec 5 8-bit weights]
    """
    return entry.name.endswith("_proj.weight")


def matrix_starts(entry: Entry) -> tuple[int, ...]:
    """The rows at which each part of a quantised entry starts, and their number at the end.

    Source   [spec 5 One β per matrix]
    """
    rows = np.arange(math.prod(entry.shape[:-1])).reshape(entry.shape[:-1])
    return *(int(rows[part.where].flat[0]) for part in entry.parts), rows.size


class MatrixCounts(NamedTuple):
    """One quantised matrix: its scale, how its weights are shared out, how many just changed."""

    scale: float  # beta
    minus: int
    zero: int
    plus: int
    flipped: int


def quantised_anew(
    parameters: Parameters, *, packed: bool, ops: Operations, on_progress: OnProgress = unseen
) -> Weights:
    """The weights of the backend's parameters, what is quantised in arrays of its own.

    packed: see `Weights.of`. on_progress: counts the weights that are quantised.

    Source   [spec 5 BitLinear]
    """
    weights = Weights.of(parameters, packed=packed, ops=ops)
    matrices = sum(len(entry.parts) for entry in parameters.table if entry.quantised)
    size = sum(math.prod(entry.shape) for entry in parameters.table if entry.quantised)
    counted = counting(on_progress, "quantising", size)
    report_X5 = ops.zeros((matrices, 5), np.float64)
    requantise(weights, parameters, report_X5, on_quantised=counted, ops=ops)
    return weights


def requantise(
    weights: Weights,
    parameters: Parameters,
    report_X5: FloatArray,
    *,
    ops: Operations,
    on_quantised: Callable[[int], object] | None = None,
) -> None:
    """Quantise the parameters into `weights`, in place.

    report_X5: overwritten by what became of each matrix (`Operations.quantise_weight`), in the table's
    order. Without quantised entries nothing is done. on_quantised: told how many more are.

    Shapes   report_X5
    Source   [spec 5 bitnet_b158 weights], [spec 5 bitnet weights]
    """
    done = 0
    for entry in parameters.table:
        weight = weights.arrays[entry.name]
        if not isinstance(weight, BitWeight):
            continue
        inputs = entry.shape[-1]
        quantization = parameters.config.quantization
        assert quantization != "none"
        ops.quantise_weight(
            parameters.arrays[entry.name].reshape(-1, inputs),
            matrix_starts(entry),
            quantization=quantization,
            q_OI=weight.w.reshape(-1, inputs),
            beta_O=weight.beta.reshape(-1),
            report_X5=report_X5[done : done + len(entry.parts)],
        )
        done += len(entry.parts)
        if weight.packed is not None:
            ops.pack_in_place(weight.w.reshape(-1, *entry.shape[-2:]), weight.packed)
        if on_quantised is not None:
            on_quantised(weight.w.size)
