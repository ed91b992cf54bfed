"""What a model's weights are: formats, sizes, scales and how quantised values are shared out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mhmoe_np.model.parameters import Entry, parameter_table
from mhmoe_np.model.weights import Weights, floats, matrix_starts
from mhmoe_np.operations.int8 import INT8, Int8Weight, from_int8
from mhmoe_np.operations.packing import unpack
from mhmoe_np.operations.table import BitWeight, PackedWeight, Weight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray, IntArray

FLOAT_BYTES, SCALE_BYTES = 4, 4


class TensorRow(NamedTuple):
    """One tensor: `bytes` as stored, padding and scale included; shares only where quantised."""

    name: str
    shape: tuple[int, ...]
    format: str  # float32, or the packed format
    bytes: int
    scale: float | None = None  # beta
    minus: float | None = None  # shares of -1, 0 and +1
    zero: float | None = None
    plus: float | None = None


class Size(NamedTuple):
    """One part of a model."""

    weights: int
    float32_bytes: int
    packed_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, padding and scales included."""
        return 8 * self.packed_bytes / self.weights

    def as_dict(self) -> dict[str, float]:
        """All figures."""
        return {**self._asdict(), "bits_per_weight": self.bits_per_weight}

    def plus(self, other: Size) -> Size:
        """Both parts together."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


def _values(weight: Weight, entry: Entry) -> tuple[IntArray | FloatArray, FloatArray | None]:
    """Floats, or quantised values and the scale of each matrix; in the entry's shape."""
    if isinstance(weight, Int8Weight):
        return from_int8(weight).reshape(entry.shape), None
    if not isinstance(weight, BitWeight | PackedWeight):
        return floats(weight), None
    q = unpack(weight.w) if isinstance(weight, PackedWeight) else weight.w
    return q.reshape(entry.shape), weight.beta.ravel()[list(matrix_starts(entry)[:-1])]


def inspect_weights(config: ModelConfig, weights: Weights) -> list[TensorRow]:
    """A row for every tensor of spec 1, in the order of computation; `weights` are the host's.

    A matrix that is packed together with others is given its part of the padding by its size.
    """
    rows = []
    for entry in parameter_table(config):
        weight = weights.arrays[entry.name]
        values, scales = _values(weight, entry)
        for i, part in enumerate(entry.parts):
            tensor = values[part.where]
            format, stored = "float32", FLOAT_BYTES * tensor.size
            if isinstance(weight, PackedWeight):
                format = weight.w.format
                stored = round(weight.w.code.nbytes * tensor.size / values.size) + SCALE_BYTES
            elif isinstance(weight, Int8Weight):
                format, stored = INT8, round(weight.nbytes * tensor.size / values.size)
            row = TensorRow(part.tensor, tensor.shape, format, stored)
            if scales is not None:
                minus, zero, plus = (
                    float(np.count_nonzero(tensor == value) / tensor.size) for value in (-1, 0, 1)
                )
                row = row._replace(scale=float(scales[i]), minus=minus, zero=zero, plus=plus)
            rows.append(row)
    return rows


def sizes(config: ModelConfig, weights: Weights) -> dict[str, Size]:
    """Weights and bytes of the quantised part, of the MoE layers, and of the whole packed model."""
    parts = {"quantised": Size(0, 0, 0), "MoE layers": Size(0, 0, 0), "model": Size(0, 0, 0)}
    for entry in parameter_table(config):
        weight = weights.arrays[entry.name]
        count = int(np.prod(entry.shape))
        stored = FLOAT_BYTES * count
        if isinstance(weight, PackedWeight):
            stored = weight.w.code.nbytes + SCALE_BYTES * len(entry.parts)
        elif isinstance(weight, Int8Weight):
            stored = weight.nbytes
        size = Size(count, FLOAT_BYTES * count, stored)
        parts["model"] = parts["model"].plus(size)
        if isinstance(weight, PackedWeight | Int8Weight):
            parts["quantised"] = parts["quantised"].plus(size)
        if _is_of_moe_layer(entry, config):
            parts["MoE layers"] = parts["MoE layers"].plus(size)
    return {name: size for name, size in parts.items() if size.weights}


def _is_of_moe_layer(entry: Entry, config: ModelConfig) -> bool:
    """Router, experts, shared expert, head and merge layer."""
    head, _, rest = entry.name.removeprefix("model.layers.").partition(".")
    return head.isdigit() and config.is_moe_layer(int(head)) and rest.startswith("mlp.")
