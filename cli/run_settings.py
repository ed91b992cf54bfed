"""What `train` and `plan` are told to do: a preset, a file over it, and options over both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import nearest, shown
from mhmoe_np.settings.presets import DEFAULT_PRESET, RUN_PRESETS
from mhmoe_np.settings.run import (
    COMMAND_LINE,
    KEYS,
    Layer,
    RunConfig,
    Tables,
    merge,
    read_toml,
    resolve,
    with_settings,
    words_of,
)

Command = TypeVar("Command", bound=Callable[..., Any])


def _presets(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in RUN_PRESETS if name.startswith(incomplete)]


def _settings(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[str]:
    """Keys, with their table or without, and an "="; behind it the values, where they are words."""
    key, equals, value = incomplete.partition("=")
    if equals:
        words = words_of(key)
        return [f"{key}={word}" for word in words if word.startswith(value)]
    bare = [known.partition(".")[2] for known in KEYS] if key else []
    keys = [*KEYS, *(name for name in bare if bare.count(name) == 1)]
    return [f"{known}=" for known in keys if known.startswith(key)]


def preset_option(command: Command) -> Command:
    """`--preset NAME`, which the shell completes."""
    return click.option(
        "--preset",
        metavar="NAME",
        shell_complete=_presets,
        help=f"Named settings (default: {DEFAULT_PRESET}); `mhmoe-np presets` lists them.",
    )(command)


def set_option(command: Command) -> Command:
    """`--set KEY=VALUE`, repeatable, which the shell completes."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=_settings,
        help="Any setting; repeatable.",
    )(command)


def base_layers(config: Path | None, preset: str | None) -> list[Layer]:
    """CONFIG over --preset; with neither, the default preset.

    Raises UserError: no such preset, or a damaged file.
    """
    if preset is not None and preset not in RUN_PRESETS:
        raise UserError(
            f"--preset {shown(preset)}: unknown{nearest(preset, RUN_PRESETS)}; "
            "`mhmoe-np presets` lists them"
        )
    if config is None:
        preset = preset or DEFAULT_PRESET
    layers = [Layer(RUN_PRESETS[preset], f"--preset {preset}")] if preset else []
    return layers if config is None else [*layers, Layer(read_toml(config), str(config))]


def resolved_config(config: Path | None, preset: str | None, over: Tables) -> RunConfig:
    """The run's configuration: `over`, from `option_tables`, over CONFIG over --preset.

    Raises UserError: no such preset, a damaged file, or a bad key; the message names the preset, the
    file or the option that set it.
    """
    return resolve([*base_layers(config, preset), Layer(over, COMMAND_LINE)])


def option_tables(
    settings: tuple[str, ...],
    data: tuple[str, ...],
    *,
    steps: int | None,
    seed: int | None = None,
    checkpoint_every: int | None = None,
    tensorboard: bool = False,
    eval_every: int | None = None,
) -> Tables:
    """What --set says, and over it the settings that have options of their own.

    Raises UserError: a --set without '=', or with an unknown or ambiguous key.
    """
    training = {
        "steps": steps,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "tensorboard": tensorboard or None,
        "eval_every": eval_every,
    }
    given: Tables = {"training": {key: value for key, value in training.items() if value is not None}}
    if data:
        given["data"] = {"paths": list(data)}
    return merge(with_settings({}, settings), given)
