"""A training run's configuration: TOML file, then `--set key=value`, then named flags; all strict."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, get_args, get_origin

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import (
    LARGEST_FACTOR,
    LARGEST_SIZE,
    Count,
    Factor,
    Fault,
    ModelConfig,
    Natural,
    Positive,
    PositiveFactor,
    StrictModel,
    fault_of,
    nearest,
    shown,
)
from mhmoe_np.storage import reading

ScheduleKind: TypeAlias = Literal["linear", "cosine", "two-stage", "constant"]
Matmul: TypeAlias = Literal["float32", "tf32", "tf32x3"]


def _recordable(path: object) -> object:
    """A path that the run's config.toml can hold and the system can open.

    Raises ValueError: empty, not UTF-8, or with a zero byte.
    """
    if isinstance(path, str):
        if not path:
            raise ValueError("a path must not be empty")
        if "\0" in path:
            raise ValueError("a path must not hold a zero byte")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError("a path must be UTF-8 to be kept with the run; rename it") from None
    return path


PathText = Annotated[str, BeforeValidator(_recordable)]


class DataConfig(StrictModel):
    """What is read. A relative path is relative to the working directory."""

    paths: list[PathText] = Field(
        default_factory=list,
        description="Text files, folders, globs, or a store; none: the embedded corpus",
    )
    tokenizer: PathText | None = Field(
        None, description="A `tokenizer.json`; none: a byte-level BPE is trained on the text"
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Share of each domain's bytes that is held out"
    )
    text_key: Annotated[str, Field(min_length=1)] = Field(
        "text", description="Where a line of JSON has its text; the column of a table"
    )
    domains: dict[str, PathText] = Field(
        default_factory=dict, description="Name of a domain and its path, beside the unnamed `paths`"
    )
    weights: dict[str, PositiveFactor] = Field(
        default_factory=dict,
        description="Name of a domain and its share of each batch, relative to the others'; "
        "none: by size",
    )


class TrainingConfig(StrictModel):
    """How long, how much at once, and what is kept."""

    steps: Positive = Field(description="Optimiser steps")
    batch_size: Positive = Field(description="Sequences of one optimiser step")
    gradient_accumulation_steps: Positive = Field(
        1, description="Parts in which a batch goes through the model; must divide `batch_size`"
    )
    sequence_length: Positive = Field(description="Tokens of one sequence")
    seed: Count = Field(0, description="Of the weights, the split and the batches")
    checkpoint_every: Positive = Field(100, description="Steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="Newest checkpoints that are kept")
    log_every: Positive = Field(10, description="Steps between progress lines")
    router_every: Positive = Field(10, description="Steps between lines of `router.jsonl`")
    tensorboard: bool = Field(False, description="Whether TensorBoard's event files are written too")
    eval_every: Natural = Field(
        0, description="Steps between scores of the held-out text; 0: at the end alone"
    )
    matmul: Matmul = Field(
        "float32",
        description="How float32 products are computed; the others need `--backend cuda`",
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps} does not divide "
                f"batch_size {self.batch_size}"
            )
        return self


class OptimizerConfig(StrictModel):
    """AdamW with decoupled decay on every parameter, and its schedule [spec 6]."""

    schedule: ScheduleKind = Field(
        "linear",
        description="How the rate falls after the warm-up; `two-stage` is BitNet's: rate and weight "
        "decay drop at half-way",
    )
    learning_rate: PositiveFactor = Field(6e-4, description="The peak")
    final_learning_rate: Factor = Field(3e-5, description="The last step's")
    second_stage_learning_rate: Factor | None = Field(
        None, description="Of `two-stage`, from half-way on; none: 2/3 of the peak"
    )
    warmup_steps: Natural = Field(375, description="Steps in which the rate rises from 0")
    weight_decay: Factor = Field(0.1, description="Of every parameter, decoupled from the gradient")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Decay of the second moment")
    # Not rounded to 0 in float32.
    epsilon: Annotated[float, Field(ge=1 / LARGEST_FACTOR, le=LARGEST_FACTOR)] = Field(
        1e-6, description="Added to the root of the second moment"
    )
    clip_norm: PositiveFactor = Field(2.0, description="The largest norm of the whole gradient")


class RunConfig(StrictModel):
    """The four tables of a run's TOML file."""

    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        if self.training.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"training.sequence_length: {self.training.sequence_length} is above "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        return self

    def identity(self) -> str:
        """The sha256 of all but `FREE_KEYS`: by it checkpoints of older releases name their run."""
        tables = self.model_dump()
        for key in (*FREE_KEYS, *YOUNGER_KEYS):
            table, _, name = key.partition(".")
            del tables[table][name]
        return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


FREE_KEYS = (
    "training.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
    "training.router_every",
    "training.tensorboard",
    "training.eval_every",
)
"""What a resumed run may change without another word: it decides no update that was made."""


YOUNGER_KEYS = ("training.matmul", "data.text_key", "data.domains", "data.weights")
"""What the releases whose checkpoints name their run by `identity` did not know."""


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`table.key` -> its two values, for every key in which two configurations differ."""
    tables, others = one.model_dump(), other.model_dump()
    return {
        f"{table}.{key}": (value, others[table][key])
        for table, values in tables.items()
        for key, value in values.items()
        if value != others[table][key]
    }


def may_change(key: str) -> bool:
    """Whether a run stays the same run when this key changes.

    The optimiser's may: an update is a function of them and of what went before. So may how products
    are computed, since a run may go on with another backend. Model, data, seed and batches may not:
    weights and tokens would no longer be those of the run.
    """
    return key in FREE_KEYS or key == "training.matmul" or key.startswith("optimizer.")


TABLES: Mapping[str, type[StrictModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
}
KEYS = tuple(f"{table}.{key}" for table, kind in TABLES.items() for key in kind.model_fields)

Tables = dict[str, dict[str, Any]]


COMMAND_LINE = "the command line"
OPTIONS = {
    "training.steps": "--steps",
    "training.seed": "--seed",
    "training.checkpoint_every": "--checkpoint-every",
    "training.tensorboard": "--tensorboard",
    "training.eval_every": "--eval-every",
    "data.paths": "--data",
}
"""The keys that have an option of their own beside `--set`."""


class Layer(NamedTuple):
    """Settings from one place. Layers lie over each other, the last one on top."""

    tables: Tables
    source: str  # what a message calls the place: a file, say; COMMAND_LINE: the key's option


def read_toml(path: Path) -> Tables:
    """The tables of a TOML file.

    Raises UserError: missing, not TOML, or a key outside the four tables.
    """
    values = reading.read_toml(path)
    for name, table in values.items():
        if name not in TABLES:
            raise UserError(f"{path}: unknown table {shown(name)}{nearest(name, TABLES)}")
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} must be a table: write [{name}] above its keys")
    return values


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Table, key and value of one `--set key=value`; the value is TOML, or text where it is not.

    The key may leave its table out where only one table has it.

    Raises UserError: no '=', an unknown or ambiguous key (the nearest known one is named), or a value
    that cannot be read.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals:
        raise UserError(f"--set {shown(setting)}: must be key=value")
    matches = [known for known in KEYS if key in (known, known.partition(".")[2])]
    if not matches:
        bare = [known.partition(".")[2] for known in KEYS]
        raise UserError(f"--set: unknown key {shown(key)}{nearest(key, [*KEYS, *bare])}")
    if len(matches) > 1:
        raise UserError(f"--set {key}: in several tables; write {' or '.join(matches)}")
    table, _, name = matches[0].partition(".")
    return table, name, _value(text, source=f"--set {key}")


def words_of(key: str) -> list[str]:
    """The values of a setting that are words; none: it has others, or there is no such key.

    The key may leave its table out where only one table has it.
    """
    matches = [known for known in KEYS if key in (known, known.partition(".")[2])]
    if len(matches) != 1:
        return []
    table, _, name = matches[0].partition(".")
    kind = TABLES[table].model_fields[name].annotation
    if kind is bool:
        return ["true", "false"]
    return [str(word) for word in get_args(kind)] if get_origin(kind) is Literal else []


def _value(text: str, *, source: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read: {reading.reason_of(error)}") from None
    # A line break in the text would begin another key.
    return values["value"] if len(values) == 1 else text.strip()


def merge(*layers: Tables) -> Tables:
    """Tables of settings laid over each other, the last one on top."""
    merged: Tables = {}
    for layer in layers:
        for table, values in layer.items():
            merged[table] = {**merged.get(table, {}), **values}
    return merged


def with_settings(tables: Tables, settings: Sequence[str]) -> Tables:
    """Lay `--set` settings over the tables, in order."""
    for setting in settings:
        table, key, value = parse_setting(setting)
        tables = merge(tables, {table: {key: value}})
    return tables


def parse_run_config(tables: Tables, *, source: str) -> RunConfig:
    """Check the tables of one place; see `resolve`."""
    return resolve([Layer(tables, source)])


def resolve(layers: Sequence[Layer]) -> RunConfig:
    """Lay the layers over each other and check them.

    `model.max_position_embeddings` not given is the sequence length.

    Raises UserError: a key is unknown (the nearest known one is named), missing or unfit; the message
    names where it was set.
    """
    tables = merge(*(layer.tables for layer in layers))
    length = tables.get("training", {}).get("sequence_length")
    # An unfit length is to be called by its own name.
    if isinstance(length, int) and 0 < length <= LARGEST_SIZE and "model" in tables:
        tables = merge({"model": {"max_position_embeddings": length}}, tables)
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        fault = fault_of(error, [key.partition(".")[2] for key in KEYS])
        source, key = _origin(fault, layers)
        if source != COMMAND_LINE:
            raise UserError(f"{source}: {fault.text}") from None
        option = f"--set {key}"
        if key in OPTIONS:
            option = f"{OPTIONS[key]} or {option}"
        raise UserError(f"{option}: {fault.text.removeprefix(f'{key}: ')}") from None


def _origin(fault: Fault, layers: Sequence[Layer]) -> tuple[str, str]:
    """Where the key at fault was set, and the key.

    Of several keys that do not go together, it is the one that was set last.
    """
    table = fault.key.partition(".")[0]
    words = set(re.findall(r"[\w.]+", fault.text)) if fault.several else set()
    named = [key for key in KEYS if key in words or key in {f"{table}.{word}" for word in words}]
    for layer in reversed(layers):
        for key in [fault.key, *named]:
            name, _, rest = key.partition(".")
            if rest.partition(".")[0] in layer.tables.get(name, {}):
                return layer.source, f"{name}.{rest.partition('.')[0]}"
    files = [layer.source for layer in layers if layer.source != COMMAND_LINE]
    return (files or [COMMAND_LINE])[-1], fault.key
