"""The page's figures as files, PNG and SVG, drawn by matplotlib: for papers and slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.report.figures import LEVEL_NAMES, Figure, HeatMap, LineChart, level_of
from mhmoe_np.report.run_page import Figures
from mhmoe_np.storage.files import write_directory_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 5.0, 3.2  # inches
DOTS_PER_INCH = 150
LEVEL_COLORS = ["#1c1e21", "#2c5aa0", "#7ba3d4", "#c9daee", "#eef0f2", "#f7d6a8", "#ee9b4a", "#c04e00"]


def write_plots(directory: Path, figures: Figures, on_progress: OnProgress = unseen) -> list[str]:
    """Write every figure as NAME.png and NAME.svg into a new directory; the names.

    Of several runs each has a folder of its own, and what compares them stands beside these.
    on_progress: counts figures.

    Raises Taken: the directory exists; OSError: the disk is full or refuses.
    """
    single = len(figures.groups) == 1
    named: dict[str, Figure] = {figure.name: figure for figure in figures.compared}
    for i, groups in enumerate(figures.groups.values()):
        for group in groups:
            for figure in group.figures:
                named[figure.name if single else f"run-{i + 1}-{figure.name}"] = figure

    def fill(folder: Path) -> None:
        for done, (name, figure) in enumerate(named.items()):
            on_progress("drawing figures", done, len(named))
            _write(folder / name, figure)

    write_directory_atomically(directory, fill)
    return list(named)


def _write(stem: Path, figure: Figure) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    # The same figure gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": "mhmoe-np", "svg.fonttype": "none", "font.size": 9}):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.subplots()
        axes.set_title(figure.title)
        if isinstance(figure, LineChart):
            _draw_curves(axes, figure)
        else:
            _draw_heat_map(axes, figure)
        canvas.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None})
        canvas.savefig(stem.with_name(f"{stem.name}.png"), dpi=DOTS_PER_INCH)


def _draw_curves(axes: Axes, chart: LineChart) -> None:
    for curve in chart.curves:
        axes.plot(
            curve.x,
            curve.y,
            label=curve.label,
            color=f"C{curve.color % 10}",
            linestyle="--" if curve.dashed else "-",
            alpha=0.3 if curve.faint else 1.0,
            linewidth=0.8 if curve.faint else 1.4,
        )
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if any(curve.label for curve in chart.curves):
        axes.legend(frameon=False)


def _draw_heat_map(axes: Axes, heat: HeatMap) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(LEVEL_NAMES)
    norm = BoundaryNorm([level - 0.5 for level in range(count + 1)], count)
    colors = ListedColormap(LEVEL_COLORS)
    mesh = axes.pcolormesh(level_of(heat.ratio), cmap=colors, norm=norm)
    axes.invert_yaxis()
    axes.set_ylabel(heat.rows)
    axes.set_xlabel(f"{heat.columns} {heat.first} to {heat.last}")
    axes.set_xticks([])
    bar = axes.figure.colorbar(mesh, ax=axes, ticks=range(count))
    bar.set_ticklabels(LEVEL_NAMES)
