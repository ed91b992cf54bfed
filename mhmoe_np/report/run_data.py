"""What a run folder says of its run: the logs as columns, and what stands beside them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_np.checkpoints.checkpoint import checkpoints_of
from mhmoe_np.checkpoints.training_state import Change, load_trainer_state
from mhmoe_np.errors import UserError
from mhmoe_np.settings.run import RunConfig, parse_run_config
from mhmoe_np.storage.reading import read_json
from mhmoe_np.training.log_file import LogLines
from mhmoe_np.training.router_statistics import RouterAlarm, RouterWarning, choices_of_a_step
from mhmoe_np.training.run_folder import (
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    ROUTER,
    RUN_CONFIG,
    VALIDATION_LOG,
    is_run_folder,
    read_run_tables,
)
from mhmoe_np.types import FloatArray, IntArray

STEP = "step"
Columns = Mapping[str, FloatArray]
"""Name -> one number a step; NaN where a line lacks it."""


@dataclass(frozen=True)
class RouterLog:
    """One layer's lines of `router.jsonl`."""

    steps: IntArray
    choices: list[IntArray]  # of each line, by head and expert
    gate_mass: list[FloatArray]  # the same
    columns: Columns


@dataclass(frozen=True)
class RunData:
    """A run, as far as it has come.

    Attributes:
        config: as it stood at the newest checkpoint.
        changes: of settings by later sittings.
        metrics: of every step.
        balances: MoE layer -> what the steps' lines say of it.
        routers: MoE layer -> its router, every few steps.
        validation: domain -> its scores while the run went on.
        evaluation: domain -> its final scores; empty before the end.
        warnings: of routers, each with the step at which it was first due.
        notices: what is wrong with the folder's files, a line each.
    """

    folder: Path
    config: RunConfig
    changes: list[Change]
    environment: Mapping[str, Any]
    metrics: Columns
    balances: Mapping[int, Columns]
    routers: Mapping[int, RouterLog]
    validation: Mapping[str, Columns]
    evaluation: Mapping[str, Mapping[str, float | None]]
    warnings: list[tuple[int, RouterWarning]]
    notices: list[str]

    @property
    def steps(self) -> int:
        """Steps made."""
        return int(self.metrics[STEP][-1]) if len(self.metrics[STEP]) else 0


def read_run(folder: Path) -> RunData:
    """Read a run folder, which may belong to a run that is under way.

    A line that is not one is left out, and a notice says how many.

    Raises UserError: it is no run folder, its configuration is damaged, or its logs are too large for
    the memory that is free.
    """
    if not is_run_folder(folder):
        raise UserError(f"{folder}: not a run folder ({RUN_CONFIG} is missing)")
    config = parse_run_config(read_run_tables(folder), source=str(folder / RUN_CONFIG))
    changes, notices = list[Change](), list[str]()
    if checkpoints := checkpoints_of(folder):
        try:
            state = load_trainer_state(checkpoints[-1], config)
            config, changes = state.config, state.changes
        except UserError as error:
            notices.append(str(error))
    logs = {name: LogLines(folder / name) for name in (METRICS, ROUTER, VALIDATION_LOG)}
    metrics, balances = _Table(), dict[int, _Table]()
    for line in logs[METRICS]:
        metrics.add(_numbers(line))
        for layer in _objects(line.get("router")):
            balances.setdefault(layer["layer"], _Table()).add({STEP: line[STEP], **layer})
    routers = _routers(logs[ROUTER], config)
    validation: dict[str, _Table] = {}
    for line in logs[VALIDATION_LOG]:
        domains = line.get("domains")
        for name, scores in (domains if isinstance(domains, dict) else {}).items():
            if isinstance(scores, dict):
                validation.setdefault(name, _Table()).add({STEP: line[STEP], **scores})
    evaluation = _read_object(folder / EVALUATION).get("domains", {})
    columns_of_layer = {layer: table.columns() for layer, table in sorted(balances.items())}
    return RunData(
        folder,
        config,
        changes,
        _read_object(folder / ENVIRONMENT),
        metrics.columns(),
        columns_of_layer,
        routers,
        {name: table.columns() for name, table in validation.items()},
        evaluation,
        _warnings(columns_of_layer, routers, config),
        notices + [log.notice for log in logs.values() if log.notice is not None],
    )


def _warnings(
    balances: Mapping[int, Columns], routers: Mapping[int, RouterLog], config: RunConfig
) -> list[tuple[int, RouterWarning]]:
    """What a run without an interruption tells of its routers, in the order of steps."""
    alarm, choices = RouterAlarm(config.model), choices_of_a_step(config)
    found = [
        (int(step), alarm.collapse(layer, share, choices))
        for layer, columns in balances.items()
        for step, share in _shares(columns, "entropy")
    ]
    found += [
        (int(step), alarm.saturation(layer, share))
        for layer, router in routers.items()
        for step, share in _shares(router.columns, "top_probability")
    ]
    raised = [(step, warning) for step, warning in found if warning is not None]
    return sorted(raised, key=lambda one: (one[0], one[1].layer))


def _shares(columns: Columns, name: str) -> Iterator[tuple[float, float]]:
    """Each step and its number of that name, where that is one from 0 to 1."""
    for step, share in zip(columns[STEP], columns.get(name, ()), strict=False):
        if 0 <= share <= 1:
            yield step, float(share)


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: holds no JSON object; take a copy, or remove it")
    return value


@dataclass
class _Table:
    """Columns that grow by a row at a time."""

    rows: int = 0
    found: dict[str, array[float]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                column = self.found.setdefault(name, array("d"))
                column.extend([np.nan] * (self.rows - len(column)))
                column.append(value)
        self.rows += 1

    def columns(self) -> Columns:
        columns = {STEP: np.empty(0)}
        for name, column in self.found.items():
            column.extend([np.nan] * (self.rows - len(column)))
            columns[name] = np.array(column)
        return columns


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line's own, and those of the quantised weights."""
    quantised = line.get("quantised")
    return {**line, **(quantised if isinstance(quantised, dict) else {})}


def _objects(value: Any) -> list[dict[str, Any]]:
    """Those that speak of a layer."""
    values = value if isinstance(value, list) else []
    return [part for part in values if isinstance(part, dict) and isinstance(part.get("layer"), int)]


def _routers(log: LogLines, config: RunConfig) -> dict[int, RouterLog]:
    shape = (config.model.moe_heads, config.model.num_experts)
    steps: dict[int, list[int]] = {}
    choices: dict[int, list[IntArray]] = {}
    masses: dict[int, list[FloatArray]] = {}
    tables: dict[int, _Table] = {}
    for line in log:
        for part in _objects(line.get("layers")):
            try:
                chosen = np.array(part["load"], dtype=np.int64)
                mass = np.array(part["gate_mass"], dtype=np.float64)
            except (KeyError, ValueError, TypeError):
                continue
            if chosen.shape != shape or mass.shape != shape:
                continue
            layer = part["layer"]
            steps.setdefault(layer, []).append(line[STEP])
            choices.setdefault(layer, []).append(chosen)
            masses.setdefault(layer, []).append(mass)
            tables.setdefault(layer, _Table()).add({STEP: line[STEP], **part})
    return {
        layer: RouterLog(np.array(steps[layer]), choices[layer], masses[layer], tables[layer].columns())
        for layer in sorted(steps)
    }
