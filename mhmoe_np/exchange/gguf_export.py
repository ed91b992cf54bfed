"""From a model of ours to a GGUF file, for llama.cpp and what reads its format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mhmoe_np.errors import UserError
from mhmoe_np.exchange.gguf_file import gguf_library
from mhmoe_np.exchange.gguf_names import (
    EXPERTS,
    LAYER,
    OUTSIDE,
    TURNED,
    neighbours_turned,
    turns_neighbours,
)
from mhmoe_np.exchange.gguf_tokenizer import NO_TOKENIZER, export_tokenizer
from mhmoe_np.model.parameters import LAYERS, Parameters
from mhmoe_np.model.weights import quantised_anew
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BitWeight
from mhmoe_np.progress import OnProgress, counting, unseen
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.files import write_atomically
from mhmoe_np.types import FloatArray

FLOAT32 = 0  # llama.cpp's number for files of float32
REQUIRED: dict[str, dict[str, object]] = {
    "llama": {"quantization": "none", "hidden_act": "silu", "use_sub_norm": False},
    "bitnet": {
        "quantization": "bitnet_b158",
        "hidden_act": "silu",
        "use_sub_norm": True,
        "num_experts": 0,
        "tie_word_embeddings": True,
    },
}
"""Architecture -> what it computes, and no other."""
REQUIRED_OF_EXPERTS: dict[str, object] = {
    "decoder_sparse_step": 1,
    "moe_heads": 1,
    "moe_head_layer": False,
    "moe_merge_layer": False,
    "moe_residual": False,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 0,
}


def export_gguf(
    parameters: Parameters,
    tokenizer: Tokenizer | None,
    path: Path,
    *,
    end_of_text: tuple[int, ...] = (),
    on_progress: OnProgress = unseen,
) -> None:
    """Write a GGUF file of float32 tensors: `llama` (dense, or experts as Mixtral's), or `bitnet`.

    Of a ternary model's quantised weights the file has -beta, 0 and beta, as llama.cpp's own converter
    writes them; the floats that are trained are not in it. Balance losses and capacity are training's
    and stay behind. A tokenizer trained here is written as GPT-2's (see `export_tokenizer`).

    end_of_text: the ids that end a text, at most three; none: the tokenizer's own. on_progress: counts
    parameters.

    Raises UserError: the model's configuration or its tokenizer has no counterpart in llama.cpp, or
    `gguf` is not installed; OSError: the disk is full or refuses. Then `path` is as it was.
    """
    config = parameters.config
    architecture = _architecture(config)
    gguf = gguf_library()
    values: dict[str, Any] = {"tokenizer.ggml.model": NO_TOKENIZER[0]}
    if tokenizer is not None:
        values = export_tokenizer(tokenizer, end_of_text, vocab_size=config.vocab_size)
    tensors = _tensors(parameters, architecture)

    def write(temporary: Path) -> None:
        with closing(gguf.GGUFWriter(temporary, architecture)) as writer:
            writer.add_file_type(FLOAT32)
            _add_hyperparameters(writer, config)
            for key, value in values.items():
                writer.add_key_value(key, value, *_type_of(gguf, value))
            for name, (shape, _) in tensors.items():
                size = int(np.prod(shape)) * np.dtype(np.float32).itemsize
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            written = counting(on_progress, "exporting", parameters.count)
            for shape, made in tensors.values():  # one at a time in memory
                writer.write_tensor_data(np.ascontiguousarray(made(), np.float32))
                written(int(np.prod(shape)))

    write_atomically(path, write)


def _architecture(config: ModelConfig) -> str:
    architecture = "bitnet" if config.is_quantised else "llama"
    required = REQUIRED[architecture] | (REQUIRED_OF_EXPERTS if config.num_experts else {})
    for key, value in required.items():
        own = getattr(config, key)
        if own != value:
            raise UserError(
                f"{key}: {own!r} has no counterpart in llama.cpp's architecture {architecture!r}, "
                f"which has {value!r}; export it with --format hf"
            )
    return architecture


def _add_hyperparameters(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.moe_intermediate_size or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _type_of(gguf: Any, value: object) -> tuple[Any, ...]:
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        return (kinds.BOOL,)
    if isinstance(value, int):
        return (kinds.UINT32,)
    if isinstance(value, str):
        return (kinds.STRING,)
    assert isinstance(value, list)
    return kinds.ARRAY, kinds.STRING if isinstance(value[0], str) else kinds.INT32


Made = tuple[tuple[int, ...], Callable[[], FloatArray]]


def _tensors(parameters: Parameters, architecture: str) -> dict[str, Made]:
    """Of each tensor of the file its shape, and how to make it."""
    config, weights = parameters.config, _weights_as_used(parameters)
    made: dict[str, Made] = {}

    def add(name: str, *ours: str) -> None:
        first = weights[ours[0]]
        if ours[0].endswith(TURNED) and turns_neighbours(architecture):
            of_q = ours[0].endswith(TURNED[0])
            heads = config.num_attention_heads if of_q else config.num_key_value_heads
            made[name] = first.shape, lambda: neighbours_turned(first, heads)
        elif len(ours) > 1:
            made[name] = (len(ours), *first.shape), lambda: np.stack([weights[our] for our in ours])
        else:
            made[name] = first.shape, lambda: first

    for theirs, name in OUTSIDE.items():
        if name in weights:
            add(theirs, name)
    for i in range(config.num_hidden_layers):
        prefix = f"{LAYERS}{i}"
        for kind, name in LAYER[architecture].items():
            if f"{prefix}.{name}.weight" in weights:
                add(f"blk.{i}.{kind}.weight", f"{prefix}.{name}.weight")
        for kind, name in EXPERTS.items() if config.num_experts else ():
            experts = range(config.num_experts)
            ours = [f"{prefix}.mlp.experts.{e}.{name}.weight" for e in experts]
            add(f"blk.{i}.{kind}_exps.weight", *ours)
    return made


def _weights_as_used(parameters: Parameters) -> dict[str, FloatArray]:
    """Every tensor by our name; what is quantised as beta times its integers."""
    if not parameters.config.is_quantised:
        return dict(parameters.tensors)
    quantised = quantised_anew(parameters, packed=False, ops=load_operations("numpy"))
    used = {}
    for entry in parameters.table:
        weight = quantised.arrays[entry.name]
        for part in entry.parts:
            used[part.tensor] = parameters.tensors[part.tensor]
            if isinstance(weight, BitWeight):
                used[part.tensor] = weight.w[part.where] * weight.beta[part.where][..., None]
    return used
