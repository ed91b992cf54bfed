"""From a GGUF file to a model of ours.

`llama` files, dense and with experts (Mixtral), are float models; `bitnet` files are ternary ones with
sub-norms. llama.cpp itself quantises activations block by block or not at all; here a ternary model is
computed as its paper does [spec 5].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.exchange.foreign import Foreign, SourceTensor, fill
from mhmoe_np.exchange.gguf_file import GgufTensor, read_gguf
from mhmoe_np.exchange.gguf_keys import Keys
from mhmoe_np.exchange.gguf_names import LAYER, TURNED, halves_turned, our_name, turns_neighbours
from mhmoe_np.exchange.gguf_tokenizer import end_of_text_ids, import_tokenizer
from mhmoe_np.model.packed import floats_of
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.room import check_room
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.settings.model import ModelConfig, parse_model_config, shown

# Keys of an architecture that are allowed at a value that changes nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (1,),  # softmax
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1.0, 0.0),  # llama.cpp passes over 0
    "rope.scaling.factor": (1.0,),
    "rope.scaling.type": ("none", "linear"),  # by the factor 1
    "use_parallel_residual": (False,),
}


def import_gguf(path: Path, *, on_progress: OnProgress = unseen) -> Foreign:
    """Read a GGUF file of the architecture `llama` or `bitnet`: configuration, weights, tokenizer.

    A `tokenizer.json` in the same folder is taken instead of the file's own tokenizer. A ternary
    model's weights become floats that quantise to the file's integers and scales again [D11].

    on_progress: counts parameters.

    Raises UserError: the file is missing, damaged, or of another architecture or type of tensor; a key
    or a tensor is missing or has no counterpart here; the model does not fit into memory; `gguf` is
    not installed.
    """
    values, tensors = read_gguf(path)
    architecture = _architecture(values, path)
    config = _config(values, architecture, tied="output.weight" not in tensors, path=path)
    check_room(config, copies=1, source=str(path))
    tokenizer = import_tokenizer(values, path, vocab_size=config.vocab_size)
    end_of_text = end_of_text_ids(values, path, vocab_size=config.vocab_size)
    found: dict[str, SourceTensor] = {}
    for tensor in tensors.values():
        for name, source in _sources(tensor, architecture, config, path):
            if name in found:
                raise UserError(
                    f"{path}: tensors {found[name].name!r} and {source.name!r} are the same"
                )
            found[name] = source
    parameters = Parameters(config, np.float32)
    fill(parameters, found, source=path, on_progress=on_progress)
    if config.is_quantised:
        _undo_ternary(parameters, found, path)
    return Foreign(parameters, tokenizer, end_of_text)


def _architecture(values: dict[str, Any], path: Path) -> str:
    kind = values.get("general.type", "model")
    if kind != "model":
        raise UserError(f"{path}: key 'general.type' is {shown(kind)}; give the file of a whole model")
    parts = values.get("split.count", 1)
    if parts not in (0, 1):
        raise UserError(
            f"{path}: key 'split.count' is {shown(parts)}: one part of several; join them with "
            "llama-gguf-split --merge"
        )
    architecture = values.get("general.architecture")
    if architecture not in LAYER:
        raise UserError(
            f"{path}: key 'general.architecture' is {shown(architecture)}; only {' and '.join(LAYER)} "
            "have a counterpart here"
        )
    return str(architecture)


def _config(values: dict[str, Any], architecture: str, *, tied: bool, path: Path) -> ModelConfig:
    keys = Keys(values, architecture, path)
    hidden_size = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(1, heads))
    inner = keys.integer("feed_forward_length")
    tokens = values.get("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {
        "vocab_size": keys.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": hidden_size,
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": inner,
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": tied,
    }
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    settings |= _experts(keys, inner, path)
    if architecture == "bitnet":
        settings |= {"quantization": "bitnet_b158", "use_sub_norm": True}
    for key, allowed in NEUTRAL.items():
        keys.must_be(key, *allowed)
    keys.ignore("tensor_data_layout")  # the name of a format that the model once had
    keys.refuse_others()
    return parse_model_config(settings, source=str(path))


def _experts(keys: Keys, inner: int, path: Path) -> dict[str, Any]:
    """The settings of a model's experts, which stand in every layer; none of a dense one."""
    experts, chosen = keys.integer("expert_count", 0), keys.integer("expert_used_count", 0)
    if not experts:
        return {}
    if chosen == 1:
        raise UserError(
            f"{path}: key 'llama.expert_used_count' is 1; llama.cpp divides the one gate by itself, "
            "and a router whose gate is always 1 has no counterpart here"
        )
    return {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", inner),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def _sources(
    tensor: GgufTensor, architecture: str, config: ModelConfig, path: Path
) -> Iterator[tuple[str, SourceTensor]]:
    """A tensor of the file under our name; stacked experts one by one."""
    name = our_name(tensor.name, architecture)
    if name is None:
        raise UserError(
            f"{path}: tensor {tensor.name!r} has no counterpart here, and without it the model would "
            "compute something else; take a model without it"
        )
    if "{e}" in name:
        if len(tensor.shape) != 3 or tensor.shape[0] != config.num_experts:
            raise UserError(
                f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"which is not a matrix for each of {config.num_experts} experts"
            )
        for e in range(config.num_experts):
            part = tensor.part(e)
            yield name.format(e=e), SourceTensor(part.name, part.shape, part.read)
    elif name.endswith(TURNED) and turns_neighbours(architecture):
        of_q = name.endswith(TURNED[0])
        heads = config.num_attention_heads if of_q else config.num_key_value_heads
        yield name, SourceTensor(tensor.name, tensor.shape, lambda: halves_turned(tensor.read(), heads))
    else:
        yield name, SourceTensor(tensor.name, tensor.shape, tensor.read)


def _undo_ternary(parameters: Parameters, found: dict[str, SourceTensor], path: Path) -> None:
    """In the place of -beta, 0 and beta, put floats that quantise to -1, 0, +1 and beta [D11]."""
    for entry in parameters.table:
        for part in entry.parts if entry.quantised else ():
            w_OI = parameters.tensors[part.tensor]
            beta = np.abs(w_OI).max()
            if not np.isin(np.abs(w_OI), (0, beta)).all():
                raise UserError(
                    f"{path}: tensor {found[part.tensor].name!r} has other values than -{beta}, 0 and "
                    f"{beta}, so it is not a ternary model's; convert it anew, as F32 or TQ2_0"
                )
            w_OI[...] = floats_of(np.sign(w_OI), beta)
