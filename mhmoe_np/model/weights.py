"""The weights as the forward uses them: floats, or BitNet's integers and scales.

Quantised once for each state of the parameters, not once for each use: whoever changes the parameters
calls `requantise`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from mhmoe_np.model.parameters import Entry, Parameters, blocks_of, output_name
from mhmoe_np.operations.packing import FormatName, PackedMatrices, empty_code
from mhmoe_np.operations.table import BitWeight, LayerWeights, Operations, Weight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


def formats_for(config: ModelConfig) -> list[FormatName]:
    """The formats that hold a model's quantised weights, the one to prefer first; none without such."""
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
        self.arrays = arrays
        self.blocks: Sequence[LayerWeights] = blocks_of(arrays, config)
        self.embedding_VD = _floats(arrays[EMBEDDING])
        self.final_norm_D = _floats(arrays[FINAL_NORM])
        self.output_VD = _floats(arrays[output_name(config)])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The float type of all that is computed."""
        return self.embedding_VD.dtype

    @classmethod
    def of(cls, parameters: Parameters, *, packed: bool) -> Self:
        """Views of the parameters; what is quantised gets arrays of its own, still to be filled.

        packed: whether these have their integers in packed form, too.
        """
        arrays: dict[str, Weight] = dict(parameters.arrays)
        dtype, formats = parameters.flat_P.dtype, formats_for(parameters.config)
        for entry in parameters.table:
            if entry.quantised:
                *experts, outputs, inputs = entry.shape
                code = empty_code(math.prod(experts), outputs, inputs, formats[0])
                arrays[entry.name] = BitWeight(
                    np.zeros(entry.shape, dtype),
                    np.zeros(entry.shape[:-1], dtype),
                    PackedMatrices(code, outputs, inputs, formats[0]) if packed else None,
                )
        return cls(parameters.config, arrays)


def _floats(array: Weight) -> FloatArray:
    assert isinstance(array, np.ndarray)
    return array


def matrix_starts(entry: Entry) -> IntArray:
    """The rows at which each part of a quantised entry starts, and their number at the end."""
    rows = np.arange(int(np.prod(entry.shape[:-1]))).reshape(entry.shape[:-1])
    return np.array([*(rows[part.where].flat[0] for part in entry.parts), rows.size])


class MatrixCounts(NamedTuple):
    """One quantised matrix: its scale, how its weights are shared out, how many just changed."""

    scale: float  # beta
    minus: int
    zero: int
    plus: int
    flipped: int


def requantise(weights: Weights, parameters: Parameters, *, ops: Operations) -> dict[str, MatrixCounts]:
    """Quantise the parameters into `weights`, in place; what became of each matrix, by tensor name.

    Source   [spec 5]. Without quantised entries nothing is done.
    """
    quantization = parameters.config.quantization
    counts: dict[str, MatrixCounts] = {}
    if quantization == "none":
        return counts
    for entry in parameters.table:
        weight = weights.arrays[entry.name]
        if not isinstance(weight, BitWeight):
            continue
        start_Z = matrix_starts(entry)
        beta_O = weight.beta.reshape(-1)
        inputs = entry.shape[-1]
        found = ops.quantise_weight(
            parameters.arrays[entry.name].reshape(-1, inputs),
            start_Z,
            quantization=quantization,
            q_OI=weight.w.reshape(-1, inputs),
            beta_O=beta_O,
        )
        if weight.packed is not None:
            ops.pack_in_place(weight.w.reshape(-1, *entry.shape[-2:]), weight.packed)
        for part, beta, row in zip(entry.parts, beta_O[start_Z[:-1]], found.tolist(), strict=True):
            counts[part.tensor] = MatrixCounts(float(beta), *row)
    return counts
