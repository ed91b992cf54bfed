"""Figures as SVG inside a page: by hand, so that they take the page's colours, light or dark.

A plotting library draws with fixed colours and fonts and takes seconds to start, at the end of each
training run; `plots` has it draw the same figures for papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from markupsafe import Markup, escape

from mhmoe_np.report.figures import Curve, Figure, HeatMap, LineChart, level_of
from mhmoe_np.types import FloatArray

WIDTH, HEIGHT = 360, 200  # in the page's pixels where it is a phone's, and not much more elsewhere
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
COLORS = 8  # that the page's style has
CELL_HEIGHTS = 4, 14  # of a heat map's row: least and most


def drawing(figure: Figure) -> Markup:
    """The figure as an `svg` element."""
    if isinstance(figure, LineChart):
        return _line_chart(figure)
    return _heat_map(figure)


def _svg(title: str, height: int, parts: list[str]) -> Markup:
    label = escape(title)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line_chart(chart: LineChart) -> Markup:
    filled = [curve for curve in chart.curves if len(curve.x)]
    if not filled:
        return _svg(chart.title, HEIGHT, [_text(WIDTH / 2, HEIGHT / 2, "no numbers", "middle")])
    x_low, x_high = _range(np.concatenate([curve.x for curve in filled]))
    y_low, y_high = _range(np.concatenate([curve.y for curve in filled]))
    margin = 0.04 * (y_high - y_low)
    # Nothing that is counted goes below 0, nor does its axis.
    y_low, y_high = (0.0 if 0 <= y_low < margin else y_low - margin), y_high + margin
    x_scale = (WIDTH - LEFT - RIGHT) / (x_high - x_low)
    y_scale = (HEIGHT - TOP - BOTTOM) / (y_high - y_low)
    parts = []
    for value, label in _ticks(y_low, y_high, 5):
        y = HEIGHT - BOTTOM - (value - y_low) * y_scale
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 5, y + 3.5, label, "end"))
    for value, label in _ticks(x_low, x_high, 5):
        if value == int(value):  # there are no half steps
            x = LEFT + (value - x_low) * x_scale
            anchor = "end" if x > WIDTH - 24 else "middle"
            parts.append(_text(min(x, WIDTH - 1), HEIGHT - 7, label, anchor))

    def path(curve: Curve) -> str:
        x = LEFT + (curve.x - x_low) * x_scale
        y = HEIGHT - BOTTOM - (curve.y - y_low) * y_scale
        points = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
        if len(curve.x) == 1:
            points += " h0.01"  # a round cap makes it a dot
        kind = " faint" * curve.faint + " dashed" * curve.dashed
        return f'<path class="curve c{curve.color % COLORS}{kind}" d="M{points}"/>'

    return _svg(chart.title, HEIGHT, [*parts, *map(path, filled)])


def _range(values: FloatArray) -> tuple[float, float]:
    """From the least to the largest; never empty."""
    low, high = float(values.min()), float(values.max())
    if low < high:
        return low, high
    return (0.0, 1.0) if low == 0 else (low - abs(low) / 10, high + abs(low) / 10)


def _ticks(low: float, high: float, most: int) -> Iterator[tuple[float, str]]:
    """Round numbers within a range, with their labels."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        value = i * step
        yield value, _label(value, step)


def _label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    largest = max(abs(value), step)
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.6g}{suffix}"
    if largest < 1e-2:
        return f"{value:.2g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _heat_map(heat: HeatMap) -> Markup:
    rows, columns = heat.ratio.shape
    cell = min(CELL_HEIGHTS[1], max(CELL_HEIGHTS[0], 160 // rows))
    height = TOP + rows * cell + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / columns
    levels = level_of(heat.ratio)
    parts = [f'<g transform="translate({LEFT} {TOP}) scale({scale:.4f} {cell})">']
    parts += [
        f'<path class="k{level}" d="{"".join(_cells(levels == level))}"/>'
        for level in np.unique(levels)
    ]
    parts.append("</g>")
    parts.append(_text(LEFT - 5, TOP + max(cell / 2 + 3.5, 7.5), "0", "end"))
    if rows * cell > 20:
        last_row = TOP + rows * cell - max(cell / 2 - 3.5, 0)
        parts.append(_text(LEFT - 5, last_row, str(rows - 1), "end"))
    parts.append(_text(LEFT, height - 7, f"{heat.columns} {heat.first}", "start"))
    if heat.last != heat.first:
        parts.append(_text(WIDTH - RIGHT, height - 7, heat.last, "end"))
    return _svg(f"{heat.title}: {heat.columns} by {heat.rows}", height, parts)


def _cells(chosen: FloatArray) -> Iterator[str]:
    """A rectangle for every run of chosen cells in a row."""
    for y, row in enumerate(chosen):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for first, end in edges.reshape(-1, 2):
            width = end - first
            yield f"M{first} {y}h{width}v1h-{width}z"
