"""`config.json` of a Hugging Face directory: read strictly, and written.

A key decides something and has a line in `hf_classes`, or decides nothing and stands in
`WITHOUT_EFFECT`; any other is refused unless it is null. Nothing that would change the mathematics is
passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mhmoe_np.errors import UserError
from mhmoe_np.exchange.hf_classes import CLASSES, GRANITE, OURS, QWEN2_MOE, REFUSED, HfClass
from mhmoe_np.settings.model import ModelConfig, nearest, parse_model_config, shown
from mhmoe_np.storage.reading import read_json

BitForm = Literal["online", "autobitlinear", "bitlinear"]
"""How BitLinears are stored: as floats, or packed with a scale that multiplies or one that divides."""

WITHOUT_EFFECT = frozenset(
    {
        *("model_type", "architectures", "auto_map", "transformers_version", "is_llama_config"),
        *("dtype", "torch_dtype", "initializer_range", "use_cache", "gradient_checkpointing"),
        *("_name_or_path", "name_or_path", "_commit_hash", "attn_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("_experts_implementation", "_experts_implementation_internal", "experts_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "transformers.js_config", "prefix"),
        # Of what a call returns, of losses in training there, and of tasks.
        *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
        *("chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type"),
        *("task_specific_params", "finetuning_task"),
        # Older files carry settings of generation here.
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "num_beams"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "early_stopping"),
        *("typical_p", "num_return_sequences", "diversity_penalty", "num_beam_groups"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"),
    }
)
# Keys of single releases: what they must be, in any class. They are not written.
STRAY: Mapping[str, tuple[Any, ...]] = {"rope_interleaved": (False,)}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


class HfModel(NamedTuple):
    """A configuration in our terms, and the class it is of."""

    config: ModelConfig
    hf_class: HfClass
    bit_form: BitForm | None  # None: no BitLinears


def read_hf_config(path: Path) -> HfModel:
    """The configuration of a Hugging Face model.

    Raises UserError: the file is missing or no JSON; the class has no counterpart; a key is unknown,
    missing or says what our mathematics cannot; the line names it.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    hf_class = _class_of(values, path)
    _check_keys(values, hf_class, path)
    given = {**hf_class.defaults, **values}
    ours = dict(hf_class.implied)
    for key, our_key in hf_class.keys.items():
        if given.get(key) is not None:
            ours[our_key] = given[key]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if key not in ours:
            raise UserError(f"{path}: missing key {key!r}")
    ours["rope_theta"] = _rope_theta(given, path)
    if hf_class is not OURS:
        # Of layers that have no experts; where all have some, nothing depends on it.
        ours.setdefault("intermediate_size", ours.get("moe_intermediate_size"))
    bit_form = _bit_form(given, hf_class, path)
    if bit_form is not None:
        ours |= {"quantization": "bitnet_b158", "use_sub_norm": ours.get("use_sub_norm", False)}
    config = parse_model_config(ours, source=str(path))
    if hf_class is GRANITE:
        _check_attention_multiplier(given["attention_multiplier"], config, path)
    return HfModel(config, hf_class, bit_form)


def _class_of(values: dict[str, Any], path: Path) -> HfClass:
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in CLASSES:
        return CLASSES[model_type]
    known = ", ".join(CLASSES)
    if isinstance(model_type, str) and model_type in REFUSED:
        reason = REFUSED[model_type]
        raise UserError(f"{path}: model_type {model_type!r} {reason}; only {known} can be imported")
    if model_type is None:
        raise UserError(f"{path}: missing key 'model_type'; it names the class, one of {known}")
    raise UserError(f"{path}: model_type {shown(model_type)} has no counterpart; known are {known}")


def _check_keys(values: dict[str, Any], hf_class: HfClass, path: Path) -> None:
    special = {*ROPE_KEYS, "quantization_config", "layer_types"}
    if hf_class is GRANITE:
        special.add("attention_multiplier")
    if hf_class is QWEN2_MOE:
        special |= {"sliding_window", "max_window_layers"}  # of use_sliding_window alone
    needed = {**STRAY, **hf_class.needed}
    known = {*hf_class.keys, *needed, *special, *WITHOUT_EFFECT}
    for key, value in values.items():
        if key not in known and value is not None:
            raise UserError(
                f"{path}: unknown key {shown(key)} of {hf_class.architecture}{nearest(key, known)}; it "
                "is not known whether it changes the model: remove it if it does not"
            )
    for key, allowed in needed.items():
        value = values.get(key, hf_class.defaults.get(key))
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) if allowed else "null"
            silent = "" if key in values else ", as the file does not say otherwise"
            raise UserError(f"{path}: {key} is {shown(value)}{silent}; only {wanted} can be expressed")
    layers = values.get("layer_types")
    if layers is not None and set(map(str, _list(layers))) != {"full_attention"}:
        raise UserError(
            f"{path}: layer_types is {shown(layers)}; only layers of 'full_attention' can be expressed"
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rope_theta(values: dict[str, Any], path: Path) -> Any:
    """The base of the rotary angles, by the keys of versions 4 and 5."""
    theta = values["rope_theta"]
    _check_rotary_share(values, "", path)
    for key in ("rope_scaling", "rope_parameters"):
        table = values.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise UserError(f"{path}: {key} is {shown(table)}; must be a table")
        for name in ("rope_type", "type"):
            if table.get(name, "default") != "default":
                raise UserError(
                    f"{path}: {key}.{name} is {shown(table[name])}; only 'default' can be expressed"
                )
        _check_rotary_share(table, f"{key}.", path)
        for name in table:
            if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
                raise UserError(f"{path}: {key}.{name} cannot be expressed")
        theta = table.get("rope_theta", theta)
    return theta


def _check_rotary_share(table: dict[str, Any], prefix: str, path: Path) -> None:
    share = table.get("partial_rotary_factor")
    if share is not None and share != 1:
        raise UserError(
            f"{path}: {prefix}partial_rotary_factor is {shown(share)}; only 1 can be expressed"
        )


def _bit_form(values: dict[str, Any], hf_class: HfClass, path: Path) -> BitForm | None:
    table = values.get("quantization_config")
    if table is None:
        return None
    where = f"{path}: quantization_config"
    if not isinstance(table, dict):
        raise UserError(f"{where} is {shown(table)}; must be a table")
    if table.get("quant_method") != "bitnet" or not hf_class.has_bit_linears:
        raise UserError(
            f"{where}.quant_method is {shown(table.get('quant_method'))} for {hf_class.architecture}; "
            "only 'bitnet' for models without experts can be expressed: convert the weights to floats"
        )
    if table.get("use_rms_norm"):
        raise UserError(f"{where}.use_rms_norm is true; norms inside linear layers cannot be expressed")
    kept = table.get("modules_to_not_convert")
    if kept not in (None, [], ["lm_head"]):
        raise UserError(f"{where}.modules_to_not_convert is {shown(kept)}; only null can be expressed")
    known = {"quant_method", "linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps"}
    for key in table:
        if key not in {*known, "modules_to_not_convert"}:
            raise UserError(f"{where}: unknown key {shown(key)}{nearest(key, known)}")
    linear_class, mode = table.get("linear_class", "bitlinear"), table.get("quantization_mode")
    if linear_class == "bitlinear":  # whatever the mode
        return "bitlinear"
    if linear_class != "autobitlinear":
        raise UserError(
            f"{where}.linear_class is {shown(linear_class)}; must be 'bitlinear' or 'autobitlinear'"
        )
    if mode not in (None, "offline", "online"):
        raise UserError(f"{where}.quantization_mode is {shown(mode)}; must be 'online' or 'offline'")
    return "online" if mode == "online" else "autobitlinear"


def _check_attention_multiplier(value: Any, config: ModelConfig, path: Path) -> None:
    wanted = config.head_dim**-0.5
    if not isinstance(value, int | float) or not math.isclose(value, wanted, rel_tol=1e-9):
        raise UserError(
            f"{path}: attention_multiplier is {shown(value)}; only head_dim^-0.5 = {wanted!r} can be "
            "expressed"
        )


def their_config(model: HfModel, end_of_text: tuple[int, ...]) -> dict[str, Any]:
    """The content of the `config.json` that transformers reads."""
    config, hf_class, bit_form = model
    values: dict[str, Any] = {
        "architectures": [hf_class.architecture],
        "model_type": hf_class.model_type,
        "torch_dtype": "float32",
        **{key: getattr(config, ours) for key, ours in hf_class.keys.items()},
        "rope_theta": config.rope_theta,
        **{key: allowed[0] if allowed else None for key, allowed in hf_class.needed.items()},
        # Otherwise the class's own: ids of another tokenizer.
        "bos_token_id": None,
        "eos_token_id": end_of_text[0] if len(end_of_text) == 1 else list(end_of_text) or None,
        "pad_token_id": None,
    }
    if hf_class is GRANITE:
        values["attention_multiplier"] = config.head_dim**-0.5
    if hf_class is OURS:
        values["auto_map"] = {
            "AutoConfig": "configuration_mhmoe.MhMoeConfig",
            "AutoModelForCausalLM": "modeling_mhmoe.MhMoeForCausalLM",
        }
    if bit_form is not None:
        values["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if bit_form == "bitlinear" else "autobitlinear",
            "quantization_mode": "online" if bit_form == "online" else "offline",
        }
    return values
