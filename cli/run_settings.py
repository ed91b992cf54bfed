"""What `train` and `plan` are told to do: a preset, a file over it, and options over both."""

from __future__ import annotations

from pathlib import Path

from mhmoe_np.errors import UserError
from mhmoe_np.settings.presets import DEFAULT_PRESET, RUN_PRESETS
from mhmoe_np.settings.run import Tables, merge, read_toml, with_settings


def base_tables(config: Path | None, preset: str | None) -> Tables:
    """CONFIG over --preset; with neither, the default preset.

    Raises UserError: no such preset, or a damaged file.
    """
    if preset is not None and preset not in RUN_PRESETS:
        from mhmoe_np.settings.model import nearest

        raise UserError(f"--preset {preset}: unknown{nearest(preset, RUN_PRESETS)}")
    named = RUN_PRESETS[preset] if preset else {} if config else RUN_PRESETS[DEFAULT_PRESET]
    return merge(named, read_toml(config) if config else {})


def option_tables(
    settings: tuple[str, ...],
    data: tuple[str, ...],
    *,
    steps: int | None,
    seed: int | None = None,
    checkpoint_every: int | None = None,
) -> Tables:
    """What --set says, and over it the settings that have options of their own.

    Raises UserError: a --set without '=', or with an unknown or ambiguous key.
    """
    training = {"steps": steps, "seed": seed, "checkpoint_every": checkpoint_every}
    given: Tables = {"training": {key: value for key, value in training.items() if value is not None}}
    if data:
        given["data"] = {"paths": list(data)}
    return merge(with_settings({}, settings), given)
