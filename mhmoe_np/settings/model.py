"""The model's configuration: the keys of `config.json`, read strictly.

Source   [spec 1 Model keys]
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mhmoe_np.errors import UserError
from mhmoe_np.storage.reading import read_json

LARGEST_SIZE = 2**31 - 1
LARGEST_COUNT = 2**63 - 1  # what a TOML file holds
LARGEST_FACTOR = 1e30  # far from where float32 ends
MOST_TENSORS = 200_000  # the header of a safetensors file holds few more

Positive = Annotated[int, Field(gt=0, le=LARGEST_SIZE)]
Natural = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]  # of bytes or tokens; a seed
PositiveCount = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
Factor = Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]
PositiveFactor = Annotated[float, Field(gt=0, le=LARGEST_FACTOR)]
WIDEST_QUANTISED = 2**24 // 128  # inputs of a BitLinear


class StrictModel(BaseModel):
    """Frozen, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Every model key of `config.json`; a saved one spells every default out.

    Letters in the descriptions are those of `types.DIMENSIONS`.
    """

    model_type: Literal["mhmoe"] = Field("mhmoe", description="Says whose checkpoint it is")
    vocab_size: Positive = Field(description="V: ids that tokens may have")
    hidden_size: Positive = Field(description="D: width of the model")
    num_hidden_layers: Positive = Field(description="L: blocks")
    num_attention_heads: Positive = Field(description="A: query heads of attention")
    num_key_value_heads: Positive = Field(
        default_factory=lambda data: data.get("num_attention_heads", 1),
        description="G: heads of keys and values, each for A / G query heads; not given: A",
    )
    head_dim: Positive = Field(
        default_factory=lambda data: max(
            1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1)
        ),
        description="C: width of an attention head, even; not given: D / A, rounded down",
    )
    intermediate_size: Positive = Field(
        description="F of a dense feed-forward network: its inner width"
    )
    max_position_embeddings: Positive = Field(
        2048,
        description="The longest sequence, in tokens; a run that does not give it takes "
        "`training.sequence_length`",
    )
    # Its powers, times a position, must be finite.
    rope_theta: Annotated[float, Field(ge=1 / LARGEST_FACTOR, le=LARGEST_FACTOR)] = Field(
        10000.0, description="Base of the rotary frequencies"
    )
    rms_norm_eps: Factor = Field(1e-5, description="Added to the mean square in every RMSNorm")
    tie_word_embeddings: bool = Field(True, description="Whether the output head is the embedding")
    hidden_act: Literal["silu", "relu2"] = Field(
        "silu", description="Activation of the gate; `relu2` is the squared ReLU"
    )
    num_experts: Natural = Field(0, description="E: experts of an MoE layer; 0: a dense model")
    num_experts_per_tok: Natural = Field(0, description="K: experts that each sub-token is sent to")
    moe_intermediate_size: Natural = Field(0, description="F of one expert: its inner width")
    decoder_sparse_step: Positive = Field(
        2, description="Every which layer has experts: from 0, layer i where (i + 1) is a multiple"
    )
    moe_heads: Positive = Field(1, description="H: sub-tokens that an MoE layer makes of a token")
    moe_head_layer: bool = Field(
        default_factory=lambda data: data.get("moe_heads", 1) > 1,
        description="Whether there is a head layer; not given: where H > 1",
    )
    moe_merge_layer: bool = Field(
        default_factory=lambda data: data.get("moe_heads", 1) > 1,
        description="Whether there is a merge layer; not given: where H > 1",
    )
    moe_projection_bias: bool = Field(False, description="Whether head and merge layer have a bias")
    moe_residual: bool = Field(
        False, description="Whether each sub-token is added to its experts' output"
    )
    norm_topk_prob: bool = Field(
        default_factory=lambda data: data.get("num_experts_per_tok", 0) > 1,
        description="Whether gates are divided by their sum over the chosen experts; not given: where "
        "K > 1. With K = 1 it must be false",
    )
    # An expert's capacity must fit an integer.
    moe_capacity_factor: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None,
        description="Limit of what an expert takes in training and traces, over an even share; "
        "none: no limit",
    )
    shared_expert_intermediate_size: Natural = Field(
        0, description="F of the expert that takes every token; 0: there is none"
    )
    router_aux_loss_type: Literal["top1", "topk"] = Field(
        "top1", description="Whether the balance loss counts first choices, or all K"
    )
    router_aux_loss_coef: Factor = Field(0.01, description="Weight of the balance loss")
    router_z_loss_coef: Factor = Field(0.0, description="Weight of the router's z-loss")
    quantization: Literal["none", "bitnet_b158", "bitnet"] = Field(
        "none", description="BitNet: `bitnet_b158` for ternary weights, `bitnet` for their signs"
    )
    use_sub_norm: bool = Field(
        default_factory=lambda data: data.get("quantization", "none") != "none",
        description="Whether an RMSNorm stands before `o_proj` and `down_proj`; not given: where "
        "weights are quantised",
    )
    quantize_moe_projections: bool = Field(
        False, description="Whether head and merge layer are quantised too"
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"{self._head_dim_origin()} is odd; rotary positions need an even width")
        if self.num_experts == 0:
            self._refuse_moe_keys_of_a_dense_model()
        else:
            self._check_moe_keys()
        if self.is_quantised:
            self._check_quantised_widths()
        if self.tensor_count > MOST_TENSORS:
            raise ValueError(
                f"num_hidden_layers: {self.num_hidden_layers} with num_experts {self.num_experts} "
                f"make {self.tensor_count:,} tensors; a checkpoint holds at most {MOST_TENSORS:,}"
            )
        return self

    def _head_dim_origin(self) -> str:
        """The width of a head, by the keys that were given."""
        if "head_dim" in self.model_fields_set:
            return f"head_dim: {self.head_dim}"
        return (
            f"hidden_size: {self.hidden_size} shared out over num_attention_heads "
            f"{self.num_attention_heads} makes head_dim {self.head_dim}, which"
        )

    def _refuse_moe_keys_of_a_dense_model(self) -> None:
        for key in (
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ):
            if getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key)} needs num_experts above 0")

    def _check_moe_keys(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is not between 1 and "
                f"num_experts {self.num_experts}"
            )
        if self.moe_intermediate_size == 0:
            raise ValueError("moe_intermediate_size: must be above 0 when num_experts is")
        if self.hidden_size % self.moe_heads:
            raise ValueError(
                f"moe_heads: {self.moe_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            raise ValueError(
                "norm_topk_prob: must be false with num_experts_per_tok 1: the gate would be "
                "constant 1 and the router would learn nothing from the task"
            )

    def _check_quantised_widths(self) -> None:
        """Beyond this width float32 no longer holds every sum of integers [spec 5]."""
        heads = "head_dim" if "head_dim" in self.model_fields_set else "num_attention_heads"
        widths = {
            "hidden_size": self.hidden_size,
            heads: self.num_attention_heads * self.head_dim,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
        }
        for key, width in widths.items():
            if width > WIDEST_QUANTISED:
                raise ValueError(
                    f"{key}: makes a quantised layer {width} wide; its products are exact up to "
                    f"{WIDEST_QUANTISED}"
                )

    @property
    def is_quantised(self) -> bool:
        """Whether attention and feed-forward weights are BitNet's."""
        return self.quantization != "none"

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return self.num_hidden_layers // self.decoder_sparse_step if self.num_experts else 0

    @property
    def tensor_count(self) -> int:
        """How many tensors a checkpoint has, before a table of them is made."""
        feed_forward = 4 if self.use_sub_norm else 3
        attention = 5 if self.use_sub_norm else 4
        projections = self.moe_head_layer + self.moe_merge_layer
        moe = 1 + projections * (2 if self.moe_projection_bias else 1)
        moe += self.num_experts * feed_forward
        moe += feed_forward if self.shared_expert_intermediate_size else 0
        dense_layers = self.num_hidden_layers - self.moe_layers
        layers = self.num_hidden_layers * (2 + attention)
        layers += dense_layers * feed_forward + self.moe_layers * moe
        return layers + (2 if self.tie_word_embeddings else 3)

    @property
    def sub_token_width(self) -> int:
        """U = D / H."""
        return self.hidden_size // self.moe_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts: every `decoder_sparse_step`-th one [R1]."""
        return self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class _Shortened(reprlib.Repr):
    """A value as Python writes it, cut to some sixty characters however large or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxstring, self.maxother = 2, 4, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write integers of more than some thousand digits."""
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return "a table"


def shown(value: object) -> str:
    """A value of any kind in at most some sixty characters, for a message."""
    text = _Shortened().repr(value)
    return text if len(text) <= 64 else f"{text[:60]}..."


class Fault(NamedTuple):
    """What is wrong with a configuration."""

    key: str  # with its table; empty where no single key is at fault
    text: str  # names the key
    several: bool = False  # whether other keys that the text names may be at fault as well


def fault_of(error: ValidationError, known: Iterable[str]) -> Fault:
    """The first thing wrong in a rejected configuration, in one line that names the key."""
    faults = error.errors(include_url=False)
    # A misspelt key is also a missing one: the misspelling is what helps.
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return Fault(key, f"unknown key {shown(key)}{nearest(path[-1], known)}")
    if fault["type"] == "missing":
        return Fault(key, f"missing key {key!r}")
    message = fault["msg"].removeprefix("Value error, ")
    named = re.match(r"[\w.]+(?=: )", message)
    if fault["type"] == "value_error" and named:
        # A check of several keys: its message begins with the one to change.
        table = f"{key}." if key else ""
        return Fault(f"{table}{named[0]}", f"{table}{message}", several=True)
    if not path:
        return Fault("", f"{message} (got {shown(fault['input'])})")
    return Fault(key, f"{key}: {message} (got {shown(fault['input'])})")


def first_fault(error: ValidationError, known: Iterable[str]) -> str:
    """One line for the first thing wrong in a rejected configuration, naming the key."""
    return fault_of(error, known).text


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`.

    Raises UserError: the file is missing or is not JSON, or a key is unknown, missing or unfit.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object of model keys")
    return parse_model_config(values, source=str(path))


def parse_model_config(values: dict[str, Any], *, source: str) -> ModelConfig:
    """Check the keys and values of a configuration that came from `source`.

    Raises UserError: a key is unknown (the nearest known one is named), missing or unfit.
    """
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_fault(error, ModelConfig.model_fields)}") from None
