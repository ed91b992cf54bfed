"""A model of ours as a directory that transformers loads: as its own class, or as the one we ship."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mhmoe_np.checkpoints.checkpoint import MODEL_CONFIG, WEIGHTS, write_tokenizer
from mhmoe_np.data.tokenizer import end_of_text_id
from mhmoe_np.errors import UserError
from mhmoe_np.exchange.bit_linear import PER_BYTE, LinearClass, pack_rows, stored_scale
from mhmoe_np.exchange.hf_classes import OURS, QWEN2_MOE, counterpart
from mhmoe_np.exchange.hf_config import HfModel, their_config
from mhmoe_np.exchange.hf_names import TheirTensor, their_tensors
from mhmoe_np.exchange.shared_gate import gate_tensors, shared_down_names
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import quantised_anew
from mhmoe_np.operations.table import BitWeight, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.files import write_json, write_text
from mhmoe_np.storage.tensors import write_tensors

TOKENIZER_CONFIG = "tokenizer_config.json"
MODELLING = ("configuration_mhmoe.py", "modeling_mhmoe.py")


def exported_as(config: ModelConfig, *, ours: bool, packed: LinearClass | None) -> HfModel:
    """How a model is exported: as its counterpart in transformers, or else as our own class.

    ours: our class in any case. packed: BitNet's weights in 2 bits, for that class of linear layers;
    None: as floats.

    Raises UserError: there is nothing to pack, or no class of transformers that reads it packed.
    """
    hf_class = OURS if ours else counterpart(config) or OURS
    if packed is None:
        is_online = hf_class is not OURS and config.is_quantised
        return HfModel(config, hf_class, "online" if is_online else None)
    if hf_class is OURS or not config.is_quantised:
        raise UserError(
            f"--packed {packed}: only dense models of quantization 'bitnet_b158' that transformers has "
            "a class for can be packed; leave it out"
        )
    for tensor in their_tensors(config, hf_class.spellings[0]):
        if tensor.entry.quantised and tensor.shape[0] % PER_BYTE:
            raise UserError(
                f"--packed {packed}: {tensor.name} has {tensor.shape[0]} rows, no multiple of the "
                f"{PER_BYTE} that one byte holds; leave it out"
            )
    return HfModel(config, hf_class, packed)


def write_hf(
    folder: Path,
    model: HfModel,
    parameters: Parameters,
    tokenizer: Tokenizer | None,
    end_of_text: tuple[int, ...],
    *,
    ops: Operations,
) -> None:
    """Fill a directory: configuration, weights in float32, tokenizer, and our classes where needed.

    model: from `exported_as`. ops: quantises what is to be packed.

    Raises OSError: the disk is full or refuses.
    """
    if tokenizer is not None:
        end_of_text = end_of_text or (end_of_text_id(tokenizer),)
    write_json(folder / MODEL_CONFIG, their_config(model, end_of_text))
    tensors = _packed(model, parameters, ops) if _is_packed(model) else _floats(model, parameters)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_tokenizer(folder, tokenizer, end_of_text)
    if tokenizer is not None:
        write_json(
            folder / TOKENIZER_CONFIG,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.config.max_position_embeddings,
                "eos_token": tokenizer.id_to_token(end_of_text[0]),
                "clean_up_tokenization_spaces": False,
            },
        )
    if model.hf_class is OURS:
        for name in MODELLING:
            source = files("mhmoe_np.exchange").joinpath("pytorch", name)
            write_text(folder / name, source.read_text(encoding="utf-8"))


def _is_packed(model: HfModel) -> bool:
    return model.bit_form in ("autobitlinear", "bitlinear")


def _floats(model: HfModel, parameters: Parameters) -> dict[str, NDArray[Any]]:
    tensors = {
        tensor.name: _array_of(tensor, parameters)
        for tensor in their_tensors(model.config, model.hf_class.spellings[0])
    }
    if model.hf_class is QWEN2_MOE:
        for name in shared_down_names(model.config):
            tensors[name] = 2 * tensors[name]
        tensors |= gate_tensors(model.config)
    return tensors


def _array_of(tensor: TheirTensor, parameters: Parameters) -> NDArray[Any]:
    if tensor.shape == tensor.entry.shape:
        return parameters.arrays[tensor.entry.name]
    (part,) = tensor.parts
    return parameters.tensors[part.tensor]


def _packed(model: HfModel, parameters: Parameters, ops: Operations) -> dict[str, NDArray[Any]]:
    assert model.bit_form in ("autobitlinear", "bitlinear")
    quantised = quantised_anew(parameters.to_device(ops), packed=False, ops=ops).to_host(ops)
    tensors: dict[str, NDArray[Any]] = {}
    for entry in parameters.table:
        weight = quantised.arrays[entry.name]
        for part in entry.parts:
            if isinstance(weight, BitWeight):
                beta = np.float32(weight.beta[part.where].flat[0])
                tensors[part.tensor] = pack_rows(weight.w[part.where])
                tensors[f"{part.tensor}_scale"] = np.array([stored_scale(beta, model.bit_form)])
            else:
                tensors[part.tensor] = parameters.tensors[part.tensor]
    return tensors
