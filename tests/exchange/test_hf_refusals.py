"""What cannot be imported or exported is refused in one line that names it, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from mhmoe_np.audit.models import settings
from mhmoe_np.checkpoints.checkpoint import load_parameters, save_model
from mhmoe_np.exchange.hf_export import exported_as, write_hf
from mhmoe_np.exchange.hf_import import import_hf
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.tensors import save_tensors
from tests.bad_inputs import snapshot
from tests.conftest import Run

OPS = load_operations("numpy")
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, mhmoe_here: Run) -> Refused:
    """Run the command line: code 2 and one line, which is returned; nothing has changed."""

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        errors = mhmoe_here(*arguments, code=2).stderr
        assert errors.startswith("mhmoe-np: ")
        assert errors.count("\n") == 1
        assert len(errors) < 400
        assert snapshot(tmp_path) == before
        return errors

    return run


def parameters_of(kind: str, **keys: Any) -> Parameters:
    made = Parameters(ModelConfig.model_validate(settings(kind) | keys), np.float32)
    initialise(made, 2)
    return made


def exported(folder: Path, made: Parameters, packed: Any = None, own: bool = False) -> Path:
    folder.mkdir()
    model = exported_as(made.config, ours=own, packed=packed)
    write_hf(folder, model, made, None, (), ops=OPS)
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---- keys -----------------------------------------------------------------------------------------

KINDS = {
    "llama": "dense",
    "mixtral": "fine-grained",
    "granite": "fine-shared",
    "qwen2-moe": "smoe",
    "bitnet": "dense-ternary",
}
BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
MISTRAL = {"model_type": "mistral"} | dict.fromkeys(["attention_bias", "mlp_bias", "pretraining_tp"])
BAD_KEYS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: "),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type is"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor cannot be expressed"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention cannot"),
    ("llama", {"rope_parameters": 5}, "rope_parameters is 5"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
    ("llama", {"rope_theta": "x"}, "rope_theta: "),
    ("llama", {"hidden_size": None}, "missing key 'hidden_size'"),
    (
        "llama",
        {"vocab_siz": 9},
        "unknown key 'vocab_siz' of LlamaForCausalLM; did you mean 'vocab_size'",
    ),
    ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
    ("llama", {"quantization_config": 8}, "quantization_config is 8"),
    ("llama", {"quantization_config": BITNET | {"use_rms_norm": True}}, "use_rms_norm is true"),
    ("llama", {"quantization_config": BITNET | {"linear_class": "x"}}, "linear_class is 'x'"),
    ("llama", {"quantization_config": BITNET | {"quantization_mode": "x"}}, "quantization_mode is 'x'"),
    ("llama", {"quantization_config": BITNET | {"groups": 2}}, "unknown key 'groups'"),
    (
        "llama",
        {"quantization_config": BITNET | {"modules_to_not_convert": ["q_proj"]}},
        "modules_to_not_convert is ['q_proj']",
    ),
    ("llama", {"model_type": "olmoe"}, "normalises queries and keys (self_attn.q_norm, k_norm)"),
    ("llama", {"model_type": "qwen3_moe"}, "normalises queries and keys"),
    ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' has no counterpart"),
    ("llama", {"model_type": None}, "missing key 'model_type'"),
    ("llama", MISTRAL | {"sliding_window": 8}, "sliding_window is 8"),
    ("llama", MISTRAL, "sliding_window is 4096"),  # the class's own default
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ("llama", {"eos_token_id": [1, -2]}, "eos_token_id is [1, -2]"),
    ("mixtral", {"sliding_window": 16}, "sliding_window is 16"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("mixtral", {"num_experts_per_tok": 1}, "norm_topk_prob: must be false"),
    ("mixtral", {"clip_qkv": 8.0}, "unknown key 'clip_qkv'"),
    ("mixtral", {"quantization_config": BITNET}, "quant_method is 'bitnet' for MixtralForCausalLM"),
    ("granite", {"attention_multiplier": 1.0}, "attention_multiplier is 1.0"),
    ("granite", {"attention_multiplier": "x"}, "attention_multiplier is 'x'"),
    ("granite", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    ("granite", {"residual_multiplier": 0.5}, "residual_multiplier is 0.5"),
    ("granite", {"logits_scaling": 2.0}, "logits_scaling is 2.0"),
    ("qwen2-moe", {"qkv_bias": True}, "qkv_bias is True"),
    ("qwen2-moe", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2-moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ("bitnet", {"attention_bias": True}, "attention_bias is True"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, kind in KINDS.items():
        keys = {"shared_expert_intermediate_size": 18} if kind == "fine-shared" else {}
        made = parameters_of("fine-grained" if keys else kind, **keys)
        exported(folder / name, made)
    return folder


@pytest.fixture
def source(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an exported directory."""

    def copy(name: str) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        for path in (sources / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


@pytest.mark.parametrize(("name", "keys", "words"), BAD_KEYS)
def test_a_key_is_refused(
    refused: Refused, source: Callable[[str], Path], name: str, keys: dict[str, Any], words: str
) -> None:
    change_config(source(name), **keys)
    line = refused("import", "source", "--out", "made")
    assert words in line
    assert "config.json: " in line


def test_a_gate_of_every_layer_cannot_be_left_out(
    refused: Refused, source: Callable[[str], Path]
) -> None:
    folder = source("qwen2-moe")
    values = json.loads((folder / "config.json").read_text())
    del values["qkv_bias"]  # true is the class's default
    (folder / "config.json").write_text(json.dumps(values))
    assert "qkv_bias is True" in refused("import", "source", "--out", "made")


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000}},
        {"rope_theta": 10_000.0, "rope_scaling": {"type": "default"}},
        {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 2},
        {"transformers_version": "9", "torch_dtype": "bfloat16", "unheard_of": None, "use_cache": True},
        {"auto_map": {"AutoConfig": "evil.Code"}, "eos_token_id": [3, 4]},
    ],
)
def test_keys_that_decide_nothing_or_the_same_are_read(
    source: Callable[[str], Path], keys: dict[str, Any]
) -> None:
    folder = source("llama")
    before = import_hf(folder)
    change_config(folder, **keys)
    found = import_hf(folder)
    assert found.parameters.config == before.parameters.config
    assert found.end_of_text == ((3, 4) if "eos_token_id" in keys else ())


# ---- tensors --------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_tensors(path, tensors, {"format": "pt"})


Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.shared_expert_gate.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.4.w2.weight"
INPUT = "model.layers.0.block_sparse_moe.input_linear.weight"
BAD_TENSORS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("llama", lambda found: found.pop(Q), f"lacks tensor '{Q}'"),
    ("llama", lambda found: found.update({"model.extra": found[Q]}), "has tensor 'model.extra'"),
    (
        "llama",
        lambda found: found.update({"model.layers.1.self_attn.q_norm.weight": found[Q]}),
        "has tensor 'model.layers.1.self_attn.q_norm.weight'",
    ),
    ("llama", lambda found: found.update({Q: found[Q][:-2]}), f"tensor '{Q}' has shape [22, 24]"),
    ("llama", lambda found: found.update({Q: found[Q] * np.float32(np.nan)}), f"tensor '{Q}' holds"),
    ("llama", lambda found: found.update({Q: found[Q].astype(np.uint8)}), f"tensor '{Q}' is U8"),
    ("llama", lambda found: found.update({Q: found[Q].astype(np.int32)}), "is I32"),
    ("llama", lambda found: found.update({"lm_head.weight": found[Q]}), "'lm_head.weight' is not"),
    ("mixtral", lambda found: found.pop(EXPERT), f"lacks tensor '{EXPERT}'"),
    ("mixtral", lambda found: found.pop(ROUTER), f"lacks tensor '{ROUTER}'"),
    (
        "mixtral",
        lambda found: found.update({EXPERT.replace(".4.", ".5."): found[EXPERT]}),
        "experts.5.w2.weight'",
    ),
    ("granite", lambda found: found.update({INPUT: found[INPUT][:4]}), "has shape [4, 28, 24]"),
    ("granite", lambda found: found.update({INPUT: found[INPUT][:, :20]}), "has shape [5, 20, 24]"),
    ("qwen2-moe", lambda found: found.pop(GATE), f"lacks tensor '{GATE}'"),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_a_tensor_is_refused(
    refused: Refused,
    source: Callable[[str], Path],
    name: str,
    change: Callable[[dict[str, Any]], Any],
    words: str,
) -> None:
    rewrite(source(name), change)
    assert words in refused("import", "source", "--out", "made")


def test_a_shared_expert_gated_by_the_token_is_refused(tmp_path: Path, refused: Refused) -> None:
    exported(tmp_path / "source", parameters_of("smoe", shared_expert_intermediate_size=18))
    rewrite(tmp_path / "source", lambda found: found[GATE].__setitem__((0, 3), 0.5))
    line = refused("import", "source", "--out", "made")
    assert f"tensor '{GATE}' gates the shared expert by the token" in line


def test_a_tied_head_may_be_stored_once_more_and_old_files_hold_frequencies(
    source: Callable[[str], Path],
) -> None:
    folder = source("llama")
    wanted = import_hf(folder).parameters.tensors

    def change(found: dict[str, Any]) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    rewrite(folder, change)
    for name, tensor in import_hf(folder).parameters.tensors.items():
        assert tensor.tobytes() == wanted[name].tobytes()


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_packed_weights_are_refused(tmp_path: Path, refused: Refused, linear_class: str) -> None:
    folder = exported(tmp_path / "source", parameters_of("dense-ternary"), packed=linear_class)
    whole = (folder / "model.safetensors").read_bytes()
    for change, words in (
        (lambda found: found[Q].__setitem__((0, 0), 255), f"'{Q}' holds a code that is no weight"),
        (lambda found: found[f"{Q}_scale"].fill(0), f"'{Q}_scale' is 0.0"),
        (lambda found: found[f"{Q}_scale"].fill(np.inf), f"'{Q}_scale' is inf"),
        (lambda found: found[f"{Q}_scale"].fill(-1), f"'{Q}_scale' is -1.0"),
        (lambda found: found.pop(f"{Q}_scale"), f"lacks tensor '{Q}_scale'"),
        (lambda found: found.update({Q: found[Q].astype(np.float32)}), f"tensor '{Q}' is F32"),
    ):
        (folder / "model.safetensors").write_bytes(whole)
        rewrite(folder, change)
        assert words in refused("import", "source", "--out", "made")


# ---- files ----------------------------------------------------------------------------------------


def test_a_directory_that_is_none_is_refused(
    tmp_path: Path, refused: Refused, source: Callable[[str], Path]
) -> None:
    assert "neither a directory nor a .gguf file" in refused("import", "nothing", "--out", "made")
    folder = source("llama")
    assert "exists already" in refused("import", "source", "--out", "source")
    (folder / "config.json").rename(tmp_path / "config.json")
    assert "config.json: no such file" in refused("import", "source", "--out", "made")
    (folder / "config.json").write_text("[]")
    assert "must hold a JSON object" in refused("import", "source", "--out", "made")
    (tmp_path / "config.json").rename(folder / "config.json")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert "not a readable safetensors file" in refused("import", "source", "--out", "made")
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refused("import", "source", "--out", "made")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    line = refused("import", "source", "--out", "made")
    assert "pytorch_model.bin alone, which can run code" in line
    assert "save_pretrained" in line


def test_a_tokenizer_whose_texts_have_no_end_is_refused(
    refused: Refused, source: Callable[[str], Path], mhmoe_here: Run
) -> None:
    folder = source("llama")
    Tokenizer(models.WordLevel({"text": 0}, unk_token="text")).save(str(folder / "tokenizer.json"))
    line = refused("import", "source", "--out", "made")
    assert "tokenizer.json: has none of the usual ends of text" in line
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    mhmoe_here("import", "source", "--out", "made")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no table 'weight_map'"),
        ({"weight_map": {Q: 5}}, "has no table 'weight_map'"),
        ({"weight_map": {Q: "../model.safetensors"}}, "which is not a file beside it"),
        ({"weight_map": {Q: "other.safetensors"}}, "other.safetensors: no such file"),
        ({"weight_map": {"x": "model.safetensors"}}, "which model.safetensors.index.json does not put"),
    ],
)
def test_an_index_is_refused(
    refused: Refused, source: Callable[[str], Path], index: Any, words: str
) -> None:
    (source("llama") / "model.safetensors.index.json").write_text(json.dumps(index))
    assert words in refused("import", "source", "--out", "made")


def test_an_index_that_promises_more_is_refused(
    refused: Refused, source: Callable[[str], Path]
) -> None:
    folder = source("llama")
    names = dict.fromkeys([*load_file(folder / "model.safetensors"), "more"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "lacks tensor 'more'" in refused("import", "source", "--out", "made")


def test_bfloat16_is_read_without_a_framework(source: Callable[[str], Path]) -> None:
    folder = source("granite")
    wanted = import_hf(folder).parameters.tensors
    rewrite(
        folder,
        lambda found: found.update(
            {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in found.items()}
        ),
    )
    for name, tensor in import_hf(folder).parameters.tensors.items():
        halved = wanted[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(tensor, halved)


# ---- out ------------------------------------------------------------------------------------------


def test_an_export_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "dense").mkdir()
    save_model(tmp_path / "dense", parameters_of("dense"), None)
    (tmp_path / "mh").mkdir()
    save_model(tmp_path / "mh", parameters_of("mh2-ternary"), None)
    (tmp_path / "odd").mkdir()
    save_model(tmp_path / "odd", parameters_of("dense-ternary", intermediate_size=21), None)
    hf = ("--format", "hf", "--out", "made", "--backend", "numpy")
    assert "no such checkpoint" in refused("export", "nothing", *hf)
    assert "exists already" in refused("export", "dense", "--format", "hf", "--out", "dense")
    for name in ("dense", "mh"):
        line = refused("export", name, *hf, "--packed", "bitlinear")
        assert "--packed bitlinear: only dense models" in line
    line = refused("export", "odd", *hf, "--packed", "autobitlinear")
    assert "mlp.gate_proj.weight has 21 rows, no multiple of the 4" in line
    for option in (("--own-class",), ("--packed", "bitlinear")):
        line = refused("export", "dense", "--format", "gguf", "--out", "made", *option)
        assert "--format gguf: takes neither" in line


def test_the_commands_are_inverse_of_each_other(tmp_path: Path, mhmoe_here: Run) -> None:
    made = parameters_of("mh3-shared-sub-norm")
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", made, None, (5,))
    assert (
        "MhMoeForCausalLM" in mhmoe_here("export", "ours", "--format", "hf", "--out", "theirs").stdout
    )
    mhmoe_here("import", "theirs", "--out", "back")
    back = load_parameters(tmp_path / "back", np.float32)
    assert back.config == made.config
    assert back.flat_P.tobytes() == made.flat_P.tobytes()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_a_packed_checkpoint_is_exported_too(tmp_path: Path, mhmoe_here: Run) -> None:
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", parameters_of("dense-ternary"), None)
    numpy = ("--backend", "numpy")
    mhmoe_here("pack", "ours", "--out", "packed", *numpy)
    for name in ("ours", "packed"):
        hf = ("--format", "hf", "--out", f"{name}-hf", "--packed", "autobitlinear")
        mhmoe_here("export", name, *hf, *numpy)
    one, other = (tmp_path / f"{name}-hf" / "model.safetensors" for name in ("ours", "packed"))
    assert one.read_bytes() == other.read_bytes()
