"""THE parameter table: every tensor's name, place, shape and initial distribution.

All parameters of a model lie in one flat buffer, so the optimiser, the gradient norm and the zeroing
are one pass each. In memory, projections of one input are joined (q, k, v; gate and up) and experts
are stacked, because one large product beats several small ones; on disk each has a tensor of its own
under the names of spec section 1, and is a view of the joined array. Nothing is transposed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.types import FloatArray

Array = TypeVar("Array")
Distribution = Literal["ones", "zeros", "embedding", "linear", "head", "merge"]
LAYERS = "model.layers."
ALIGNMENT = 16  # elements between starts of arrays: 64 bytes of float32


class Part(NamedTuple):
    """One tensor on disk: where it lies in its array, and how it starts."""

    tensor: str
    where: tuple[int | slice, ...]
    start: Distribution


class Entry(NamedTuple):
    """One array in memory, and the tensors on disk that fill it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    quantised: bool = False  # whether its parts are weights of BitLinears


def _whole(name: str, shape: tuple[int, ...], start: Distribution, *, quantised: bool = False) -> Entry:
    return Entry(name, shape, (Part(name, (), start),), quantised)


def _feed_forward(prefix: str, width: int, inner: int, config: ModelConfig) -> list[Entry]:
    F, D = inner, width
    entries = [
        Entry(
            f"{prefix}.gate_up_proj.weight",
            (2 * F, D),
            (
                Part(f"{prefix}.gate_proj.weight", (slice(0, F),), "linear"),
                Part(f"{prefix}.up_proj.weight", (slice(F, 2 * F),), "linear"),
            ),
            config.is_quantised,
        ),
        _whole(f"{prefix}.down_proj.weight", (D, F), "linear", quantised=config.is_quantised),
    ]
    if config.use_sub_norm:
        entries.append(_whole(f"{prefix}.ffn_sub_norm.weight", (F,), "ones"))
    return entries


def _attention(prefix: str, config: ModelConfig) -> list[Entry]:
    D, A, G, C = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    ends = {"q": (0, A * C), "k": (A * C, (A + G) * C), "v": ((A + G) * C, (A + 2 * G) * C)}
    entries = [
        Entry(
            f"{prefix}.qkv_proj.weight",
            ((A + 2 * G) * C, D),
            tuple(
                Part(f"{prefix}.{letter}_proj.weight", (slice(*end),), "linear")
                for letter, end in ends.items()
            ),
            config.is_quantised,
        )
    ]
    if config.use_sub_norm:
        entries.append(_whole(f"{prefix}.attn_sub_norm.weight", (A * C,), "ones"))
    out = _whole(f"{prefix}.o_proj.weight", (D, A * C), "linear", quantised=config.is_quantised)
    return [*entries, out]


def _experts(prefix: str, config: ModelConfig) -> list[Entry]:
    E, F, U = config.num_experts, config.moe_intermediate_size, config.sub_token_width
    gate_up = tuple(
        Part(f"{prefix}.{e}.{which}_proj.weight", (e, slice(first, first + F)), "linear")
        for e in range(E)
        for which, first in (("gate", 0), ("up", F))
    )
    down = tuple(Part(f"{prefix}.{e}.down_proj.weight", (e,), "linear") for e in range(E))
    norm = tuple(Part(f"{prefix}.{e}.ffn_sub_norm.weight", (e,), "ones") for e in range(E))
    entries = [
        Entry(f"{prefix}.gate_up_proj.weight", (E, 2 * F, U), gate_up, config.is_quantised),
        Entry(f"{prefix}.down_proj.weight", (E, U, F), down, config.is_quantised),
    ]
    if config.use_sub_norm:
        entries.append(Entry(f"{prefix}.ffn_sub_norm.weight", (E, F), norm))
    return entries


def _moe(prefix: str, config: ModelConfig) -> list[Entry]:
    D = config.hidden_size
    entries = [_whole(f"{prefix}.gate.weight", (config.num_experts, config.sub_token_width), "linear")]
    projections: list[tuple[bool, str, Distribution, Distribution]] = [
        (config.moe_head_layer, "head_proj", "head", "linear"),
        (config.moe_merge_layer, "merge_proj", "merge", "zeros"),
    ]
    quantised = config.is_quantised and config.quantize_moe_projections
    for present, name, start, bias_start in projections:
        if present:
            entries.append(_whole(f"{prefix}.{name}.weight", (D, D), start, quantised=quantised))
        if present and config.moe_projection_bias:
            entries.append(_whole(f"{prefix}.{name}.bias", (D,), bias_start))
    entries += _experts(f"{prefix}.experts", config)
    if config.shared_expert_intermediate_size:
        entries += _feed_forward(
            f"{prefix}.shared_expert", D, config.shared_expert_intermediate_size, config
        )
    return entries


def parameter_table(config: ModelConfig) -> list[Entry]:
    """Every array of the model, in the order of computation.

    Source   [spec 1 tensor names]; which of them are quantised [spec 5 never quantised]; their initial
             distributions [spec 6 initialisation]
    """
    V, D = config.vocab_size, config.hidden_size
    entries = [_whole("model.embed_tokens.weight", (V, D), "embedding")]
    for layer in range(config.num_hidden_layers):
        prefix = f"{LAYERS}{layer}"
        entries.append(_whole(f"{prefix}.input_layernorm.weight", (D,), "ones"))
        entries += _attention(f"{prefix}.self_attn", config)
        entries.append(_whole(f"{prefix}.post_attention_layernorm.weight", (D,), "ones"))
        if config.is_moe_layer(layer):
            entries += _moe(f"{prefix}.mlp", config)
        else:
            entries += _feed_forward(f"{prefix}.mlp", D, config.intermediate_size, config)
    entries.append(_whole("model.norm.weight", (D,), "ones"))
    if not config.tie_word_embeddings:
        entries.append(_whole("lm_head.weight", (V, D), "linear"))
    return entries


class Parameters:
    """One flat buffer and its views: weights, their gradients, or an optimiser's moments.

    Attributes:
        flat_P: the whole buffer, zeros at first; also the few elements between arrays stay 0.
        arrays: the arrays of the table by name, views of flat_P.
        blocks: for each layer its arrays, by name without `model.layers.{i}.`.
        tensors: the tensors on disk by name, views of the arrays.
    """

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, *, flat_P: FloatArray | None = None
    ) -> None:
        """Views of flat_P, in which every parameter of `config` lies; None: zeros, on the host.

        dtype: float32 or float64.
        """
        self.config = config
        self.table = parameter_table(config)
        places, length = {}, 0
        for entry in self.table:
            places[entry.name] = length
            length += -(-math.prod(entry.shape) // ALIGNMENT) * ALIGNMENT
        self.flat_P: FloatArray = np.zeros(length, dtype) if flat_P is None else flat_P
        self.arrays: dict[str, FloatArray] = {
            entry.name: self.flat_P[places[entry.name] :][: math.prod(entry.shape)].reshape(entry.shape)
            for entry in self.table
        }
        self.tensors: dict[str, FloatArray] = {
            part.tensor: self.arrays[entry.name][part.where]
            for entry in self.table
            for part in entry.parts
        }
        self.blocks: list[dict[str, FloatArray]] = blocks_of(self.arrays, config)

    def zeros_like(self, *, ops: Operations) -> Parameters:
        """As many zeros, allocated by the backend: a gradient, or a moment."""
        dtype = self.flat_P.dtype
        return Parameters(self.config, dtype, flat_P=ops.zeros(self.flat_P.shape, dtype))

    def to_device(self, ops: Operations) -> Parameters:
        """The host's as the backend's: these themselves, or a copy."""
        return Parameters(self.config, self.flat_P.dtype, flat_P=ops.to_device(self.flat_P))

    def to_host(self, ops: Operations) -> Parameters:
        """The backend's as the host's: these themselves, or a copy."""
        return Parameters(self.config, self.flat_P.dtype, flat_P=ops.to_host(self.flat_P))

    @property
    def count(self) -> int:
        """How many numbers there are, without those between arrays."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def output_VD(self) -> FloatArray:
        """The output head: the embedding itself where the two are tied."""
        return self.arrays[output_name(self.config)]


def output_name(config: ModelConfig) -> str:
    """The array of the output head.

    Source   [spec 1 not tied]
    """
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def blocks_of(arrays: Mapping[str, Array], config: ModelConfig) -> list[dict[str, Array]]:
    """For each layer its arrays, by name without `model.layers.{i}.`.

    Source   [spec 1 tensor names]
    """
    blocks: list[dict[str, Array]] = [{} for _ in range(config.num_hidden_layers)]
    for name, array in arrays.items():
        if name.startswith(LAYERS):
            layer, _, rest = name.removeprefix(LAYERS).partition(".")
            blocks[int(layer)][rest] = array
    return blocks


def initialise(parameters: Parameters, seed: int, on_progress: OnProgress = unseen) -> None:
    """Draw every tensor from its distribution: a pure function of (seed, tensor name).

    Embedding N(0, D^-1/2); head layer Xavier uniform with gain 1/sqrt(2), merge layer with gain 1, its
    bias 0; norms 1; every other linear, and the head layer's bias, U(+-1/sqrt(in)).

    on_progress: counts bytes.

    Source   [spec 6 initialisation], from [R1]
    """
    drawn = counting(on_progress, "drawing weights", parameters.count * parameters.flat_P.itemsize)
    D = parameters.config.hidden_size
    for entry in parameters.table:
        for part in entry.parts:
            tensor = parameters.tensors[part.tensor]
            digest = hashlib.sha256(part.tensor.encode()).digest()
            rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
            if part.start in ("ones", "zeros"):
                tensor[...] = part.start == "ones"
            elif part.start == "embedding":
                tensor[...] = rng.normal(0, D**-0.5, tensor.shape)
            else:
                width = tensor.shape[-1]
                bound = {
                    "linear": width**-0.5,
                    # Xavier: gain * sqrt(6 / (in + out)), both D
                    "head": math.sqrt(0.5) * math.sqrt(6 / (2 * D)),
                    "merge": math.sqrt(6 / (2 * D)),
                }[part.start]
                tensor[...] = rng.uniform(-bound, bound, tensor.shape)
            drawn(tensor.nbytes)
