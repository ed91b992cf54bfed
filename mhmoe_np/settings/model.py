"""The model's configuration: the keys of `config.json`, read strictly.

Source   [spec 1 Model keys]
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mhmoe_np.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
WIDEST_QUANTISED = 2**24 // 128  # inputs of a BitLinear


class StrictModel(BaseModel):
    """Frozen, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Every model key of `config.json`; a saved one spells every default out.

    Letters in the comments are those of `types.DIMENSIONS`.
    """

    model_type: Literal["mhmoe"] = "mhmoe"
    vocab_size: Positive  # V
    hidden_size: Positive  # D
    num_hidden_layers: Positive  # L
    num_attention_heads: Positive  # A
    num_key_value_heads: Positive = Field(  # G
        default_factory=lambda data: data.get("num_attention_heads", 1)
    )
    head_dim: Positive = Field(  # C
        default_factory=lambda data: max(
            1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1)
        )
    )
    intermediate_size: Positive  # F of a dense feed-forward network
    max_position_embeddings: Positive = 2048
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rms_norm_eps: Annotated[float, Field(ge=0)] = 1e-5
    tie_word_embeddings: bool = True
    hidden_act: Literal["silu", "relu2"] = "silu"
    num_experts: Natural = 0  # E; 0: a dense model
    num_experts_per_tok: Natural = 0  # K
    moe_intermediate_size: Natural = 0  # F of one expert
    decoder_sparse_step: Positive = 2
    moe_heads: Positive = 1  # H
    moe_head_layer: bool = Field(default_factory=lambda data: data.get("moe_heads", 1) > 1)
    moe_merge_layer: bool = Field(default_factory=lambda data: data.get("moe_heads", 1) > 1)
    moe_projection_bias: bool = False
    norm_topk_prob: bool = Field(default_factory=lambda data: data.get("num_experts_per_tok", 0) > 1)
    moe_capacity_factor: Annotated[float, Field(gt=0)] | None = None
    shared_expert_intermediate_size: Natural = 0
    router_aux_loss_type: Literal["top1", "topk"] = "top1"
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.01
    router_z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    quantization: Literal["none", "bitnet_b158", "bitnet"] = "none"
    use_sub_norm: bool = Field(default_factory=lambda data: data.get("quantization", "none") != "none")
    quantize_moe_projections: bool = False

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary positions need an even width")
        if self.num_experts == 0:
            self._refuse_moe_keys_of_a_dense_model()
        else:
            self._check_moe_keys()
        if self.is_quantised:
            self._check_quantised_widths()
        return self

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
        widths = {
            "hidden_size": self.hidden_size,
            "head_dim": self.num_attention_heads * self.head_dim,
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


def first_fault(error: ValidationError, known: Iterable[str]) -> str:
    """One line for the first thing wrong in a rejected configuration, naming the key."""
    faults = error.errors()
    # A misspelt key is also a missing one: the misspelling is what helps.
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(path[-1], known)}"
    if fault["type"] == "missing":
        return f"missing key {key!r}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {fault['input']!r})" if path else message


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`.

    Raises UserError: the file is missing or is not JSON, or a key is unknown, missing or unfit.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
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
