"""GGUF files, in and out, beside gguf's own reading of them and transformers'."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from mhmoe_np.audit.trace import trace
from mhmoe_np.data.tokenise import tokenise
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.exchange import gguf_file
from mhmoe_np.exchange.foreign import Foreign
from mhmoe_np.exchange.gguf_export import export_gguf
from mhmoe_np.exchange.gguf_file import READABLE
from mhmoe_np.exchange.gguf_import import import_gguf
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.model.weights import quantised_anew
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BitWeight
from tests.exchange.gguf_files import Parts, Stored, put_together, take_apart
from tests.whole_models import parameters_of

OPS = load_operations("numpy")
TOKENS = np.random.default_rng(4).integers(0, 37, (3, 17))
UNTIED = {"tie_word_embeddings": False}
BIG = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 9}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "grouped heads of their own width, untied": ("dense-grouped-heads", UNTIED),
    "experts": ("fine-grained", {}),
    "all experts, grouped heads": ("all-experts", {"num_key_value_heads": 2}),
}
# Words of every kind, and what stands between them.
TEXTS = [
    "def f(x):\n\treturn x**2  # it's 1234567 o'clock, WE'LL see\n\n\n    pass",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 नमस्ते",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é ﬁ ½ ² ٣٤ \u2028\ufeff\x00",
    "   three  spaces\t\ttabs\r\n\r\n  and   1 2  33   444    5555 \n",
    "",
]


def logits_of(parameters: Parameters) -> np.ndarray:
    return trace(Model.of(parameters, ops=OPS), TOKENS, gradients=False, ops=OPS)["logits"]


def through_a_file(parameters: Parameters, path: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    export_gguf(parameters, tokenizer, path)
    return import_gguf(path)


@pytest.fixture(params=MODELS)
def parameters(request: pytest.FixtureRequest) -> Parameters:
    kind, changes = MODELS[request.param]
    return parameters_of(kind, **changes)


# ---- models ---------------------------------------------------------------------------------------


def test_a_model_comes_back_with_the_same_bits(parameters: Parameters, tmp_path: Path) -> None:
    foreign = through_a_file(parameters, tmp_path / "model.gguf")
    assert foreign.tokenizer is None
    assert foreign.end_of_text == ()
    config, own = foreign.parameters.config.model_dump(), parameters.config.model_dump()
    if parameters.config.num_experts:
        own["intermediate_size"] = own["moe_intermediate_size"]  # no layer has the former
    own["router_aux_loss_coef"] = config["router_aux_loss_coef"]  # training's
    assert config == own
    assert foreign.parameters.tensors.keys() == parameters.tensors.keys()
    for name, tensor in parameters.tensors.items():
        assert foreign.parameters.tensors[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" not in name])
def test_transformers_computes_the_same_from_a_dense_file(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    parameters = parameters_of(kind, **changes)
    export_gguf(parameters, None, tmp_path / "model.gguf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[:, :-1])).logits.numpy()
    assert np.abs(logits_of(parameters) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" in name])
def test_transformers_computes_the_same_from_a_files_experts(name: str, tmp_path: Path) -> None:
    """It reads no such files, so its Mixtral is filled by `gguf` and its own order of q and k."""
    kind, changes = MODELS[name]
    parameters = parameters_of(kind, **changes)
    export_gguf(parameters, None, tmp_path / "model.gguf")
    values, tensors = take_apart(tmp_path / "model.gguf")
    config = MixtralConfig(
        vocab_size=values["llama.vocab_size"],
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=values["llama.attention.head_count"],
        num_key_value_heads=values["llama.attention.head_count_kv"],
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        num_local_experts=values["llama.expert_count"],
        num_experts_per_tok=values["llama.expert_used_count"],
        tie_word_embeddings="output.weight" not in tensors,
    )
    turned = LlamaTensorProcessor(config.to_dict())
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"].data,
        "model.norm.weight": tensors["output_norm.weight"].data,
        "lm_head.weight": tensors["token_embd.weight"].data,
    }
    for i in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"blk.{i}.").removesuffix(".weight"): stored.data
            for name, stored in tensors.items()
            if name.startswith(f"blk.{i}.")
        }
        for letter in "qk":
            name = f"blk.{i}.attn_{letter}.weight"
            layer[f"attn_{letter}"] = turned.process(layer[f"attn_{letter}"], name).weights
        named = {
            "input_layernorm": layer["attn_norm"],
            "post_attention_layernorm": layer["ffn_norm"],
            "self_attn.o_proj": layer["attn_output"],
            "mlp.gate": layer["ffn_gate_inp"],
        } | {f"self_attn.{letter}_proj": layer[f"attn_{letter}"] for letter in "qkv"}
        state |= {f"model.layers.{i}.{name}.weight": data for name, data in named.items()}
        gate_up = np.concatenate([layer["ffn_gate_exps"], layer["ffn_up_exps"]], axis=1)
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = gate_up
        state[f"model.layers.{i}.mlp.experts.down_proj"] = layer["ffn_down_exps"]
    theirs = MixtralForCausalLM(config).eval()
    theirs.set_experts_implementation("eager")  # the others ask for widths that are multiples of 4
    theirs.load_state_dict({name: torch.tensor(data) for name, data in state.items()})
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[:, :-1])).logits.numpy()
    assert np.abs(logits_of(parameters) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_experts_may_lie_apart_as_in_older_files(tmp_path: Path) -> None:
    parameters = parameters_of("fine-grained")
    export_gguf(parameters, None, tmp_path / "model.gguf")
    values, tensors = take_apart(tmp_path / "model.gguf")
    apart = {
        name.replace("_exps.weight", f".{e}.weight"): Stored(matrix, stored.kind)
        for name, stored in tensors.items()
        if "_exps" in name
        for e, matrix in enumerate(stored.data)
    }
    whole = {name: stored for name, stored in tensors.items() if "_exps" not in name}
    put_together(Parts(values, whole | apart), tmp_path / "apart.gguf")
    foreign = import_gguf(tmp_path / "apart.gguf")
    assert foreign.parameters.flat_P.tobytes() == parameters.flat_P.tobytes()
    put_together(Parts(values, tensors | apart), tmp_path / "both.gguf")
    line = refusal(lambda: import_gguf(tmp_path / "both.gguf"))
    assert "tensors 'blk.0.ffn_gate_exps.weight[0]' and 'blk.0.ffn_gate.0.weight' are the same" in line


@pytest.mark.parametrize("kind", [None, Kind.TQ1_0, Kind.TQ2_0, Kind.F16])
def test_a_ternary_model_comes_back_with_its_integers_and_scales(
    kind: Kind | None, tmp_path: Path
) -> None:
    # [spec 5 bitnet_b158 weights], [D11]
    parameters = parameters_of("dense-ternary", **(BIG if kind else {}))
    export_gguf(parameters, None, tmp_path / "model.gguf")
    if kind:
        values, tensors = take_apart(tmp_path / "model.gguf")
        packed = {
            name: Stored.quantised(stored.data, kind) if stored.data.ndim == 2 else stored
            for name, stored in tensors.items()
            if name != "token_embd.weight"
        }
        packed["token_embd.weight"] = tensors["token_embd.weight"]
        put_together(Parts(values, packed), tmp_path / "model.gguf")
    foreign = import_gguf(tmp_path / "model.gguf")
    assert foreign.parameters.config == parameters.config.model_copy(
        update={"router_aux_loss_coef": foreign.parameters.config.router_aux_loss_coef}
    )
    ours = quantised_anew(parameters, packed=False, ops=OPS)
    theirs = quantised_anew(foreign.parameters, packed=False, ops=OPS)
    for name, weight in ours.arrays.items():
        again = theirs.arrays[name]
        if isinstance(weight, BitWeight):
            assert isinstance(again, BitWeight)
            np.testing.assert_array_equal(again.w, weight.w, err_msg=name)
            beta = weight.beta.astype(np.float16) if kind else weight.beta  # packed scales are halves
            np.testing.assert_array_equal(again.beta, beta, err_msg=name)
        else:
            np.testing.assert_array_equal(again, weight, err_msg=name)
    if kind is None:
        np.testing.assert_array_equal(logits_of(foreign.parameters), logits_of(parameters))


# ---- kinds of tensors -----------------------------------------------------------------------------


def half(low: int, high: int) -> float:
    return float(np.array([low | high << 8], np.uint16).view(np.float16)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibbles(packed: list[int]) -> list[int]:
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def q6_k(b: list[int]) -> list[float]:
    ql, qh, scales, d = b[:128], b[128:192], b[192:208], half(*b[208:])
    y = [0.0] * 256
    for n in (0, 1):
        for l in range(32):
            low, high = ql[64 * n + l], qh[32 * n + l]
            other = ql[64 * n + l + 32]
            fours = [low & 15, other & 15, low >> 4, other >> 4]
            for j, four in enumerate(fours):
                q = (four | (high >> 2 * j & 3) << 4) - 32
                y[128 * n + 32 * j + l] = d * signed(scales[8 * n + 2 * j + l // 16]) * q
    return y


def trits(packed: list[int], each: int) -> list[int]:
    return [((byte * 3**n & 255) * 3 >> 8) - 1 for n in range(each) for byte in packed]


def tq1_0(b: list[int]) -> list[float]:
    d = half(*b[52:])
    return [d * q for q in trits(b[:32], 5) + trits(b[32:48], 5) + trits(b[48:52], 4)]


def tq2_0(b: list[int]) -> list[float]:
    d = half(*b[64:])
    return [d * ((b[j + m] >> 2 * l & 3) - 1) for j in (0, 32) for l in range(4) for m in range(32)]


# One block of bytes -> its numbers, as ggml's `dequantize_row_*` and `block_*` say it.
DEFINITIONS: dict[Kind, Callable[[list[int]], list[float]]] = {
    Kind.F16: lambda b: [half(*b)],
    Kind.BF16: lambda b: [float(np.array([b[0] << 16 | b[1] << 24], np.uint32).view(np.float32)[0])],
    Kind.Q8_0: lambda b: [half(*b[:2]) * signed(q) for q in b[2:]],
    Kind.Q4_0: lambda b: [half(*b[:2]) * (q - 8) for q in nibbles(b[2:])],
    Kind.Q4_1: lambda b: [half(*b[:2]) * q + half(*b[2:4]) for q in nibbles(b[4:])],
    Kind.Q6_K: q6_k,
    Kind.TQ1_0: tq1_0,
    Kind.TQ2_0: tq2_0,
}


def test_the_definitions_are_of_every_kind() -> None:
    assert {"F32", *(kind.name for kind in DEFINITIONS)} == set(READABLE)


@pytest.mark.parametrize("kind", DEFINITIONS, ids=lambda kind: kind.name)
def test_every_kind_of_tensor_is_read_by_its_definition(kind: Kind, tmp_path: Path) -> None:
    """`gguf` writes those that it can, and blocks of any bytes stand for the others."""
    parameters = parameters_of("dense", **BIG)
    export_gguf(parameters, None, tmp_path / "model.gguf")
    values, tensors = take_apart(tmp_path / "model.gguf")
    rng = np.random.default_rng(kind.value)
    for name, stored in tensors.items():
        if stored.data.ndim < 2:
            continue
        if kind == Kind.Q6_K:
            blocks = rng.integers(0, 256, (len(stored.data), 210), np.uint8)
            blocks[:, -1] = 0x21  # the scale's sign and exponent: a small number
            tensors[name] = Stored(blocks, kind)
        else:
            tensors[name] = Stored.quantised(stored.data, kind)
    put_together(Parts(values, tensors), tmp_path / "quantised.gguf")
    found = import_gguf(tmp_path / "quantised.gguf").parameters.tensors
    ffn = "model.layers.0.mlp.down_proj.weight"
    for name, stored in (
        ("model.embed_tokens.weight", tensors["token_embd.weight"]),
        (ffn, tensors["blk.0.ffn_down.weight"]),
    ):
        np.testing.assert_array_equal(found[name], stored.values)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rows = tensors["blk.0.ffn_down.weight"].data.view(np.uint8).reshape(-1, size).tolist()
    wanted = np.array([DEFINITIONS[kind](block) for block in rows[:512]])
    read = found[ffn].reshape(-1)[: wanted.size].reshape(wanted.shape)
    # Products of two or three factors: each rounds once in float32.
    np.testing.assert_allclose(read, wanted, rtol=3e-7, atol=3e-7 * np.abs(wanted).max())


# ---- what is refused ------------------------------------------------------------------------------


def value(key: str, value: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.values.update({key: value})


def without(key: str) -> Callable[[Parts], None]:
    return lambda parts: parts.values.pop(key) and None


def tensor(name: str, *shape: int, kind: Kind = Kind.F32) -> Callable[[Parts], None]:
    data = np.full(shape, 0.5, np.float32)
    return lambda parts: parts.tensors.update({name: Stored.quantised(data, kind)})


def no_tensor(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.tensors.pop(name) and None


def spoilt(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.tensors[name].data.__setitem__(0, np.nan)


REFUSED: dict[str, tuple[Callable[[Parts], None], str]] = {
    "architecture": (value("general.architecture", "qwen2"), "general.architecture' is 'qwen2'"),
    "no architecture": (without("general.architecture"), "general.architecture' is None"),
    "adapter": (value("general.type", "adapter"), "'general.type' is 'adapter'"),
    "one part": (value("split.count", 3), "'split.count' is 3"),
    "no width": (without("llama.embedding_length"), "lacks key 'llama.embedding_length'"),
    "no eps": (without("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    "heads by layer": (value("llama.attention.head_count", [4, 4]), "head_count' must be an integer"),
    "odd heads": (value("llama.attention.head_count_kv", 3), "num_key_value_heads"),
    "no heads": (value("llama.attention.head_count", 0), "num_attention_heads"),
    "half-turned": (value("llama.rope.dimension_count", 4), "rope.dimension_count' is 4"),
    "values' width": (value("llama.attention.value_length", 8), "value_length' is 8"),
    "rope scaling": (value("llama.rope.scaling.type", "yarn"), "rope.scaling.type' is 'yarn'"),
    "rope factor": (value("llama.rope.scaling.factor", 8.0), "rope.scaling.factor' is 8.0"),
    "rope base": (value("llama.rope.freq_base", "much"), "rope.freq_base' must be a number"),
    "rope factors": (tensor("rope_freqs.weight", 3), "rope_freqs.weight"),
    "window": (value("llama.attention.sliding_window", 16), "llama.attention.sliding_window' (16)"),
    "logit scale": (value("llama.logit_scale", 0.5), "llama.logit_scale' (0.5)"),
    "bias": (tensor("blk.0.attn_q.bias", 24), "blk.0.attn_q.bias"),
    "third layer": (tensor("blk.2.attn_norm.weight", 24), "blk.2.attn_norm.weight"),
    "layer 01": (tensor("blk.01.attn_norm.weight", 24), "blk.01.attn_norm.weight"),
    "sub-norm": (tensor("blk.0.attn_sub_norm.weight", 24), "blk.0.attn_sub_norm.weight"),
    "experts": (tensor("blk.0.ffn_gate_exps.weight", 5, 14, 24), "ffn_gate_exps"),
    "lacking": (no_tensor("blk.1.attn_k.weight"), "model.layers.1.self_attn.k_proj.weight"),
    "shape": (tensor("blk.1.attn_k.weight", 24, 20), "[24, 20]"),
    "kind": (tensor("blk.1.attn_k.weight", 24, 32, kind=Kind.Q5_0), "is Q5_0"),
    "not finite": (spoilt("blk.1.ffn_up.weight"), "'blk.1.ffn_up.weight' holds numbers"),
    "one of one": (
        lambda parts: parts.values.update({"llama.expert_count": 5, "llama.expert_used_count": 1}),
        "expert_used_count' is 1",
    ),
    "no memory": (value("llama.vocab_size", 2**31 - 1), "memory"),
    "nothing": (value("llama.block_count", 0), "num_hidden_layers"),
    "SentencePiece": (value("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model' is 'llama'"),
    "cut": (
        lambda parts: parts.values.update(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}
        ),
        "tokenizer.ggml.pre' is 'viking'",
    ),
    "no cut": (value("tokenizer.ggml.model", "gpt2"), "tokenizer.ggml.pre' is None"),
    "no tokens": (
        lambda parts: parts.values.update(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
        ),
        "lacks key 'tokenizer.ggml.tokens'",
    ),
    "end of text": (value("tokenizer.ggml.eos_token_id", 37), "eos_token_id' is 37"),
}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    export_gguf(parameters_of("dense"), None, tmp_path / "model.gguf")
    parts = take_apart(tmp_path / "model.gguf")
    change(parts)
    put_together(parts, tmp_path / "other.gguf")
    line = refusal(lambda: import_gguf(tmp_path / "other.gguf"))
    assert words in line
    assert line.startswith(str(tmp_path / "other.gguf"))


def test_a_float_model_is_no_ternary_one(tmp_path: Path) -> None:
    export_gguf(parameters_of("dense-ternary"), None, tmp_path / "model.gguf")
    values, tensors = take_apart(tmp_path / "model.gguf")
    tensors["blk.1.ffn_up.weight"].data[3, 4] *= 0.75
    put_together(Parts(values, tensors), tmp_path / "model.gguf")
    assert "'blk.1.ffn_up.weight' has other values" in refusal(
        lambda: import_gguf(tmp_path / "model.gguf")
    )


NO_COUNTERPART = {
    "mh2": "moe_heads: 2",
    "mh2-residual": "moe_heads: 2",
    "smoe": "decoder_sparse_step: 2",
    "smoe-every-layer": "norm_topk_prob: False",
    "dense-relu2-sub-norm-untied": "hidden_act: 'relu2'",
    "dense-sign-grouped-relu2": "quantization: 'bitnet'",
    "fine-ternary": "num_experts: 5",
}


@pytest.mark.parametrize("kind", NO_COUNTERPART)
def test_a_model_without_a_counterpart_is_not_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")
    line = refusal(lambda: export_gguf(parameters_of(kind), None, path))
    assert NO_COUNTERPART[kind] in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"before"


def test_damage_ends_in_one_line(tmp_path: Path) -> None:
    """A file cut at any place, and with any byte of its head another one, is refused or read."""
    export_gguf(parameters_of("dense"), None, tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    head = content.index(b"blk.1.ffn_down") + 100
    damaged = tmp_path / "damaged.gguf"
    for length in [0, 3, *np.linspace(4, len(content) - 1, 40, dtype=int)]:
        damaged.write_bytes(content[:length])
        assert "not a readable GGUF file" in refusal(lambda: import_gguf(damaged))
    rng = np.random.default_rng(7)
    refused = []
    for place, change in zip(rng.integers(0, head, 150), rng.integers(1, 256, 150), strict=True):
        changed = bytearray(content)
        changed[place] ^= change
        damaged.write_bytes(changed)
        try:
            import_gguf(damaged)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 75
    assert not any("\n" in line for line in refused)


def test_a_length_that_lies_does_not_take_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself would count to the length, reading nothing."""
    export_gguf(parameters_of("dense"), None, tmp_path / "model.gguf")
    parts = take_apart(tmp_path / "model.gguf")
    parts.values["general.tags"] = [1, 2, 3]
    put_together(parts, tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    place = content.index(b"general.tags") + len("general.tags") + 8
    lying = content[:place] + (2**60).to_bytes(8, "little") + content[place + 8 :]
    (tmp_path / "model.gguf").write_bytes(lying)
    assert "ends at byte" in refusal(lambda: import_gguf(tmp_path / "model.gguf"))
    # In a file of gigabytes it would read these, one by one.
    monkeypatch.setattr(gguf_file, "MOST_PARTS", 60)
    assert "more than 60 values" in refusal(lambda: import_gguf(tmp_path / "model.gguf"))


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    with closing(gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)) as writer:
        writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    assert "gguf-convert-endian" in refusal(lambda: import_gguf(path))


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_gguf(parameters_of("dense"), None, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for action in (
        lambda: import_gguf(tmp_path / "model.gguf"),
        lambda: export_gguf(parameters_of("dense"), None, tmp_path / "other.gguf"),
    ):
        assert "pip install 'mhmoe-np[gguf]'" in refusal(action)
    assert not (tmp_path / "other.gguf").exists()


# ---- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([*TEXTS, "it's what the others say " * 20], vocab_size=330)


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenise([text], tokenizer).tolist() for text in TEXTS]


@pytest.fixture
def with_tokenizer(trained: Tokenizer, tmp_path: Path) -> Path:
    """A model of 340 tokens with a tokenizer of up to 330 trained here."""
    path = tmp_path / "model.gguf"
    export_gguf(parameters_of("dense", vocab_size=340), trained, path)
    return path


def changed(path: Path, **values: Any) -> Path:
    parts = take_apart(path)
    parts.values.update({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    put_together(parts, path)
    return path


def test_a_tokenizer_comes_back(trained: Tokenizer, with_tokenizer: Path) -> None:
    foreign = import_gguf(with_tokenizer)
    assert foreign.tokenizer is not None
    assert foreign.end_of_text == (0,)
    assert foreign.parameters.config.vocab_size == 340
    assert foreign.tokenizer.get_vocab() == trained.get_vocab()
    assert ids_of(foreign.tokenizer) == ids_of(trained)
    again = through_a_file(foreign.parameters, with_tokenizer, foreign.tokenizer).tokenizer
    assert again is not None
    assert again.to_str() == foreign.tokenizer.to_str()


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_text_is_cut_as_transformers_cuts_it(pre: str, with_tokenizer: Path) -> None:
    path = changed(with_tokenizer, pre=pre, add_bos_token=False)
    ours = import_gguf(path).tokenizer
    architecture, described, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, described)
    assert ours is not None
    # A text in its canonical form: transformers leaves out Qwen's normalisation.
    texts = [text.replace("e\u0301", "é") for text in TEXTS]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text).ids, text


CUT = {
    "gpt-2": ["a", " 1234", "  ", " it", "'s", "=>", "\n"],
    "smollm": ["a", " ", "1", "2", "3", "4", "  ", " it", "'s", "=>", "\n"],
    "llama-bpe": ["a", " ", "123", "4", "  ", " it", "'s", "=>\n"],
    "qwen2": ["a", " ", "1", "2", "3", "4", "  ", " it", "'s", "=>\n"],
    "default": ["a", " ", "123", "4", "  ", " it", "'", "s", "=>", "\n"],
}


@pytest.mark.parametrize("pre", CUT)
def test_words_are_what_each_name_says(pre: str, with_tokenizer: Path) -> None:
    tokenizer = import_gguf(changed(with_tokenizer, pre=pre, add_bos_token=False)).tokenizer
    assert tokenizer is not None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a 1234   it's=>\n")
    back = {"Ġ": " ", "Ċ": "\n"}
    words = ["".join(back.get(sign, sign) for sign in word) for word, _ in pieces]
    assert words == CUT[pre]


def test_marked_tokens_and_a_begin_come_along(with_tokenizer: Path) -> None:
    values = take_apart(with_tokenizer).values
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    tokens[-2:], kinds[-2:] = ["<|begin|>", "<think>"], [3, 4]
    path = changed(with_tokenizer, tokens=tokens, token_type=kinds, pre="llama-bpe", bos_token_id=338)
    path = changed(path, add_bos_token=None, eot_token_id=5)  # Llama 3's default: it is added
    foreign = import_gguf(path)
    tokenizer = foreign.tokenizer
    assert tokenizer is not None
    assert foreign.end_of_text == (0, 5)
    assert tokenizer.encode("x").ids == [338, *tokenizer.encode("x", add_special_tokens=False).ids]
    # The name of a special token in a text is text; a token that a user defined is not.
    assert 338 not in tokenise(["<|begin|>"], tokenizer)
    assert tokenise(["<think>"], tokenizer).tolist() == [339]
    assert tokenizer.decode([338], skip_special_tokens=True) == ""
    again = through_a_file(foreign.parameters, path, tokenizer).tokenizer
    assert again is not None
    assert again.to_str() == tokenizer.to_str()
    with_end = import_gguf(changed(path, add_eos_token=True)).tokenizer
    assert with_end is not None
    assert with_end.encode("x").ids == [*again.encode("x").ids, 0]
    assert "elsewhere than before" in refusal(lambda: export_gguf(foreign.parameters, with_end, path))


def test_ends_of_texts_are_written(with_tokenizer: Path, trained: Tokenizer) -> None:
    parameters = parameters_of("dense", vocab_size=340)
    export_gguf(parameters, trained, with_tokenizer, end_of_text=(7, 3, 9))
    assert import_gguf(with_tokenizer).end_of_text == (7, 3, 9)
    assert "4 ids [1, 2, 3, 4]" in refusal(
        lambda: export_gguf(parameters, trained, with_tokenizer, end_of_text=(1, 2, 3, 4))
    )


def test_a_tokenizer_beside_the_file_is_taken(trained: Tokenizer, with_tokenizer: Path) -> None:
    path = changed(with_tokenizer, model="llama")
    trained.save(str(path.with_name("tokenizer.json")))
    found = import_gguf(path).tokenizer
    assert found is not None
    assert found.to_str() == trained.to_str()
    train_tokenizer(TEXTS, vocab_size=345).save(str(path.with_name("tokenizer.json")))
    assert "tokenizer.json: knows 345 ids" in refusal(lambda: import_gguf(path))


@pytest.mark.parametrize(
    ("key", "bad", "words"),
    [
        ("tokens", ["a", "b"], "has 2 tokens"),
        ("merges", ["no such"], "does not fit the tokens"),
        ("merges", ["a b c"], "does not fit the tokens"),
        ("merges", None, "lacks key 'tokenizer.ggml.merges'"),
        ("token_type", [1, 2], "a kind for each token"),
        ("add_bos_token", True, "lacks key 'tokenizer.ggml.bos_token_id'"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_one_line(
    key: str, bad: Any, words: str, with_tokenizer: Path
) -> None:
    path = changed(with_tokenizer, **{key: bad})
    assert words in refusal(lambda: import_gguf(path))


def test_a_tokenizer_without_words_for_it_is_not_written(trained: Tokenizer, tmp_path: Path) -> None:
    parameters, path = parameters_of("dense", vocab_size=340), tmp_path / "model.gguf"
    by_blanks = Tokenizer.from_str(trained.to_str())
    by_blanks.pre_tokenizer = pre_tokenizers.Whitespace()
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    for tokenizer, said in (
        (by_blanks, "cuts text into words in none of the ways"),
        (words, "is no byte-level BPE"),
        (train_tokenizer([], vocab_size=257), "has no merges"),
    ):
        assert said in refusal(lambda: export_gguf(parameters, tokenizer, path))  # noqa: B023
    small = parameters_of("dense")
    assert "knows 330 ids" in refusal(lambda: export_gguf(small, trained, path))
    assert not list(tmp_path.iterdir())
