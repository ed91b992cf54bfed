"""A run, or several side by side, as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.costs.model import parameter_count
from mhmoe_np.errors import UserError
from mhmoe_np.report.expert_tokens import ExpertTokens
from mhmoe_np.report.figures import (
    CELLS,
    LEVEL_NAMES,
    Group,
    LineChart,
    comparison_of,
    figures_of,
    smoothed,
)
from mhmoe_np.report.run_data import RunData, read_run
from mhmoe_np.report.svg import COLORS, drawing
from mhmoe_np.report.templates import template
from mhmoe_np.settings.run import differences
from mhmoe_np.storage.files import write_atomically, write_text
from mhmoe_np.training.run_folder import REPORT

SCORES = {
    "token_ppl": "perplexity per token",
    "word_ppl": "per word",
    "byte_ppl": "per byte",
    "bits_per_byte": "bits per byte",
    "tokens": "tokens",
}


class Figures(NamedTuple):
    """What is to be seen of some runs, by the names that the page calls them."""

    compared: list[LineChart]  # empty of a single run
    groups: dict[str, list[Group]]


class Measure(NamedTuple):
    """One row of the comparison: a number of each run, and how far each is from the first."""

    label: str
    values: list[float | None]

    @property
    def changes(self) -> list[float | None]:
        """Relative to the first run; None where there is none to be named."""
        first = self.values[0]
        return [
            None if i == 0 or value is None or not first else value / first - 1
            for i, value in enumerate(self.values)
        ]


def read_runs(folders: Sequence[Path]) -> dict[str, RunData]:
    """Runs by a name for each: their folders' names where these differ.

    Raises UserError: a folder is given twice, or see `read_run`.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{twice}: given twice; name each run once")
    return {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}


def figures_of_runs(runs: Mapping[str, RunData]) -> Figures:
    """All that is drawn of these runs."""
    cells = CELLS // len(runs)
    groups = {name: figures_of(run, cells=cells) for name, run in runs.items()}
    return Figures(comparison_of(runs) if len(runs) > 1 else [], groups)


def run_page(runs: Mapping[str, RunData], tokens: Mapping[str, ExpertTokens | None]) -> str:
    """The whole page.

    tokens: what experts take, of the runs for which that was computed.
    """
    figures = figures_of_runs(runs)
    page = template("run.html", FILTERS)
    return page.render(
        runs=runs,
        figures=figures,
        tokens=tokens,
        colors=COLORS,
        levels=list(enumerate(LEVEL_NAMES)),
        scores=SCORES,
        summaries={name: dict(_summary(run)) for name, run in runs.items()},
        measures=_measures(runs) if len(runs) > 1 else [],
        settings=_settings(runs),
        configurations={name: _flat(run.config.model_dump()) for name, run in runs.items()},
    )


def write_run_page(run: Path) -> Path:
    """Write the page of a single run into its folder, without what experts take; where it is.

    Raises UserError: see `read_run`; OSError: the disk is full or refuses.
    """
    text = run_page(read_runs([run]), {})
    write_atomically(run / REPORT, lambda path: write_text(path, text))
    return run / REPORT


def number(value: float | None) -> str:
    """A number as a reader wants it."""
    if value is None or not np.isfinite(value):
        return "none"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _percent(change: float) -> str:
    return f"{change:+.1%}".replace("-", "\N{MINUS SIGN}") if change else "same"


FILTERS: Mapping[str, Callable[..., Any]] = {
    "drawing": drawing,
    "number": number,
    "percent": _percent,
    "zip": partial(zip, strict=True),
}


def _summary(run: RunData) -> list[tuple[str, float | None]]:
    """The run in a few numbers, by their labels."""
    metrics = run.metrics
    rows: list[tuple[str, float | None]] = [
        ("steps", run.steps),
        ("parameters", parameter_count(run.config.model).total),
        ("parameters that a token meets", parameter_count(run.config.model).active),
    ]
    if not run.steps:
        return rows
    rows += [
        ("tokens trained on", metrics["tokens"][-1]),
        ("loss, the last steps' mean", smoothed(metrics["loss"])[-1]),
        ("of it next-token NLL", smoothed(metrics["nll"])[-1]),
        ("tokens a second, median", float(np.median(metrics["tokens_per_s"]))),
        (
            "seconds of training",
            float(np.sum(np.diff(metrics["tokens"], prepend=0) / metrics["tokens_per_s"])),
        ),
    ]
    if run.balances:
        last = [{key: column[-1] for key, column in layer.items()} for layer in run.balances.values()]
        rows += [
            ("entropy of the load, worst layer", min(layer["entropy"] for layer in last)),
            ("busiest expert, max/mean, worst layer", max(layer["max_over_mean"] for layer in last)),
            ("dead experts, all layers", sum(layer["dead"] for layer in last)),
        ]
    if "flipped" in metrics:
        rows.append(("weights that the last step flipped", metrics["flipped"][-1]))
    return rows


def _measures(runs: Mapping[str, RunData]) -> list[Measure]:
    """What the runs are compared by."""
    summaries = [dict(_summary(run)) for run in runs.values()]
    labels = list(dict.fromkeys(label for summary in summaries for label in summary))
    rows = [Measure(label, [summary.get(label) for summary in summaries]) for label in labels]
    domains = dict.fromkeys(domain for run in runs.values() for domain in run.evaluation)
    rows += [
        Measure(
            f"{domain}: {SCORES[key]}",
            [run.evaluation.get(domain, {}).get(key) for run in runs.values()],
        )
        for domain in domains
        for key in ("token_ppl", "bits_per_byte")
    ]
    return rows


def _settings(runs: Mapping[str, RunData]) -> dict[str, list[str]]:
    """Each key in which any run differs from the first -> its value in every run."""
    configs = [run.config for run in runs.values()]
    keys = [key for config in configs[1:] for key in differences(configs[0], config)]
    values = [_flat(config.model_dump()) for config in configs]
    return {key: [value[key] for value in values] for key in dict.fromkeys(keys)}


def _flat(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`table.key` -> its value in words."""
    return {
        f"{table}.{key}": "none"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
        for table, values in tables.items()
        for key, value in values.items()
    }
