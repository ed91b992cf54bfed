"""What is drawn of a run: curves and heat maps as numbers, whoever draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_np.report.run_data import STEP, Columns, RunData
from mhmoe_np.types import FloatArray

POINTS = 300  # of one curve, about: no screen shows more
CELLS = 24_000  # of all heat maps of a page, so that it stays small
MOST_COLUMNS = 60
SMOOTHED_SHARE = 50  # a smoothed value is the mean of this part of all steps, but at least
SMOOTHED_LEAST = 10

LEVELS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Where a heat map's colours change, in multiples of the balanced load; 0 has a colour of its own."""
LEVEL_NAMES = (
    "none: dead",
    "below 1/4",
    "1/4 to 1/2",
    "1/2 to 0.8",
    "about 1: balanced",
    "1.25 to 2",
    "2 to 4",
    "above 4",
)


class Curve(NamedTuple):
    """Points joined by a line."""

    label: str
    x: FloatArray
    y: FloatArray
    color: int
    faint: bool = False  # raw values behind their mean
    dashed: bool = False  # what another curve may lie under


class LineChart(NamedTuple):
    """Curves over the steps."""

    name: str  # of its file
    title: str
    curves: list[Curve]
    note: str = ""


class HeatMap(NamedTuple):
    """How often experts were chosen, in multiples of the balanced load: rows by columns."""

    name: str
    title: str
    rows: str  # what a row is
    columns: str
    ratio: FloatArray
    first: str  # label of the first column
    last: str


Figure = LineChart | HeatMap


class Group(NamedTuple):
    """Figures that belong together."""

    title: str
    note: str
    figures: Sequence[Figure]


def level_of(ratio: FloatArray) -> FloatArray:
    """The index into `LEVEL_NAMES` of each ratio: 0 is nothing at all."""
    return np.where(ratio == 0, 0, 1 + np.digitize(ratio, LEVELS))


def smoothed(y: FloatArray) -> FloatArray:
    """The mean of the last `window_of` values, or of as many as there are."""
    window = window_of(len(y))
    total = np.concatenate([[0.0], np.cumsum(y)])
    last = np.arange(1, len(y) + 1)
    first = np.maximum(0, last - window)
    return (total[last] - total[first]) / (last - first)


def window_of(steps: int) -> int:
    """How many steps a smoothed value is the mean of."""
    return max(SMOOTHED_LEAST, steps // SMOOTHED_SHARE)


def thinned(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """About `POINTS` of the finite points: of every stretch the lowest and the highest."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        kept |= {int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
    index = sorted(kept)
    return x[index], y[index]


def figures_of(run: RunData, *, cells: int = CELLS) -> list[Group]:
    """All figures of one run; what it has no numbers of is left out.

    cells: how many all its heat maps together may have.
    """
    groups = [
        Group("Training", "", list(_training(run))),
        Group("Held-out text while training", "", list(_validation(run))),
        Group("Ternary weights" if _is_ternary(run) else "1-bit weights", "", list(_quantised(run))),
        Group(
            "How evenly the experts are used",
            "Entropy of the experts' shares of all choices, over its largest value: 1 when balanced, "
            "and log K / log E where all tokens go the same way. Max/mean: the choices of the busiest "
            "expert. Dead: experts that no token of the step's batch chose.",
            list(_balance(run)),
        ),
        Group(
            "Which experts are used, over time",
            "A row is an expert, a column a stretch of the run; colours are choices in multiples of an "
            "even share.",
            list(_loads(run, cells)),
        ),
        Group(
            "Which experts each head uses",
            "At the last step that was looked at. A row is a head, a column an expert. Gate mass is "
            "the sum of the weights that the choices were given.",
            list(_heads(run)),
        ),
    ]
    return [group for group in groups if group.figures]


def comparison_of(runs: Mapping[str, RunData]) -> list[LineChart]:
    """Several runs in the same charts."""
    wanted = {
        "nll": "Loss without router losses (nats), smoothed",
        "gradient_norm": "Gradient norm, smoothed",
        "tokens_per_s": "Tokens a second, smoothed",
    }
    charts = []
    for key, title in wanted.items():
        curves = [
            _curve(name, run.metrics[STEP], smoothed(run.metrics[key]), color)
            for color, (name, run) in enumerate(runs.items())
            if key in run.metrics
        ]
        charts.append(LineChart(f"compared-{key}", title, curves))
    for key, title in (
        ("entropy", "Entropy of the experts' load, the worst layer"),
        ("max_over_mean", "Busiest expert, max/mean, the worst layer"),
    ):
        worst = np.min if key == "entropy" else np.max
        curves = [
            _curve(
                name,
                run.metrics[STEP],
                worst([columns[key] for columns in run.balances.values()], axis=0),
                color,
            )
            for color, (name, run) in enumerate(runs.items())
            if run.balances and all(len(c[key]) == run.steps for c in run.balances.values())
        ]
        charts.append(LineChart(f"compared-{key}", title, curves))
    return [chart for chart in charts if chart.curves]


def _curve(label: str, x: FloatArray, y: FloatArray, color: int, *, faint: bool = False) -> Curve:
    return Curve(label, *thinned(x, y), color, faint)


def _training(run: RunData) -> Iterator[LineChart]:
    metrics = run.metrics
    step = metrics[STEP]
    for key, title in (("loss", "Loss (nats)"), ("gradient_norm", "Gradient norm, before clipping")):
        if key in metrics:
            note = f"Smoothed: the mean of {window_of(len(step))} steps."
            curves = [
                _curve("each step", step, metrics[key], 0, faint=True),
                _curve("smoothed", step, smoothed(metrics[key]), 0),
            ]
            yield LineChart(key, title, curves, note)
    for key, title in (
        ("learning_rate", "Learning rate"),
        ("tokens_per_s", "Tokens a second"),
    ):
        if key in metrics:
            yield LineChart(key, title, [_curve("", step, metrics[key], 0)])
    if run.balances:
        yield LineChart(
            "router_losses",
            "Router losses, summed over layers",
            [
                _curve("balance", step, metrics["aux_loss"], 0),
                _curve("z", step, metrics["z_loss"], 1),
            ],
        )


def _validation(run: RunData) -> Iterator[LineChart]:
    curves = [
        _curve(name, columns[STEP], columns["token_ppl"], color)
        for color, (name, columns) in enumerate(run.validation.items())
        if "token_ppl" in columns
    ]
    if curves:
        yield LineChart("validation", "Perplexity per token", curves)


def _balance(run: RunData) -> Iterator[LineChart]:
    for key, title in (
        ("entropy", "Normalised entropy of the load"),
        ("max_over_mean", "Busiest expert, max/mean"),
        ("dead", "Dead experts"),
        ("dropped", "Choices dropped beyond capacity"),
    ):
        if key == "dropped" and run.config.model.moe_capacity_factor is None:
            continue
        yield from _by_layer(f"router_{key}", title, run.balances, [key])
    logs = {layer: log.columns for layer, log in run.routers.items()}
    yield from _by_layer("router_logits", "Router logits, smallest and largest", logs, LOGITS)
    yield from _by_layer("router_top", "Probability of the first choice", logs, ["top_probability"])


LOGITS = ["logit_min", "logit_max"]


def _by_layer(
    name: str, title: str, layers: Mapping[int, Columns], keys: Sequence[str]
) -> Iterator[LineChart]:
    """One curve a layer and key, those of a layer in one colour."""
    curves = [
        _curve(f"layer {layer}" if key == keys[0] else "", columns[STEP], columns[key], color)
        for color, (layer, columns) in enumerate(layers.items())
        for key in keys
        if key in columns
    ]
    if curves:
        yield LineChart(name, title, curves)


def _loads(run: RunData, cells: int) -> Iterator[HeatMap]:
    if not run.routers:
        return
    experts = run.config.model.num_experts
    most = min(MOST_COLUMNS, max(4, cells // (experts * len(run.routers))))
    for layer, log in run.routers.items():
        load = np.array([choices.sum(axis=0) for choices in log.choices], dtype=np.float64)
        parts = np.array_split(load, min(most, len(load)))
        yield HeatMap(
            f"load_layer_{layer}",
            f"Layer {layer}",
            "expert",
            "step",
            np.array([_ratio(part.sum(axis=0)) for part in parts]).T,
            str(log.steps[0]),
            str(log.steps[-1]),
        )


def _heads(run: RunData) -> Iterator[HeatMap]:
    for layer, log in run.routers.items():
        for name, what, values in (
            ("choices", "choices", log.choices[-1]),
            ("gates", "gate mass", log.gate_mass[-1]),
        ):
            ratio = np.array([_ratio(of_head) for of_head in values])
            last = str(ratio.shape[1] - 1)
            title = f"Layer {layer}, {what}"
            yield HeatMap(f"heads_{name}_layer_{layer}", title, "head", "expert", ratio, "0", last)


def _ratio(load: FloatArray) -> FloatArray:
    total = load.sum()
    return load * len(load) / total if total else load * 0.0


def _is_ternary(run: RunData) -> bool:
    return run.config.model.quantization == "bitnet_b158"


def _quantised(run: RunData) -> Iterator[LineChart]:
    step = run.metrics[STEP]
    shares = {"minus": "-1", "zero": "0", "plus": "+1"}
    if not _is_ternary(run):
        del shares["zero"]
    curves = [
        _curve(label, step, run.metrics[key], color)._replace(dashed=key == "plus")
        for color, (key, label) in enumerate(shares.items())
        if key in run.metrics
    ]
    if curves:
        yield LineChart("quantised_shares", "Shares of the quantised weights", curves)
    if "flipped" in run.metrics:
        curve = _curve("", step, run.metrics["flipped"], 0)
        yield LineChart("flipped", "Quantised weights that a step changed", [curve])
