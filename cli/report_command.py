"""`mhmoe-np report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.new_file import check_new_file
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.extras import check_installed
from mhmoe_np.operations.table import BackendName

if TYPE_CHECKING:
    from mhmoe_np.report.expert_tokens import ExpertTokens

OF_SEVERAL = Path("comparison.html")


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"A new file (default: report.html in the run folder, written anew; of several runs "
    f"{OF_SEVERAL}).",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write every figure as PNG and SVG too; a new directory.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    default=8192,
    show_default=True,
    metavar="N",
    help="Held-out tokens sent through the newest checkpoint, to see which ones each expert takes; "
    "0: none.",
)
@threads_option
@backend_option
def command(
    runs: tuple[Path, ...],
    out: Path | None,
    plots: Path | None,
    tokens: int,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Write a page on a run, or on several side by side: one file that needs no network.

    Loss, perplexity, learning rate, gradient norm and speed as curves; which experts are used, over
    time and by each head; which tokens each expert takes; ternary shares; configuration. A run may be
    under way.
    """
    from mhmoe_np.report.run_page import figures_of_runs, read_runs, run_page
    from mhmoe_np.storage.files import write_atomically, write_text
    from mhmoe_np.training.run_folder import REPORT

    if out is not None:
        check_new_file(out, option="--out")
    elif len(runs) > 1:
        check_new_file(OF_SEVERAL, option="--out")
    if plots is not None:
        check_installed("matplotlib", extra="plots", needed_by="--plots")
        if os.path.lexists(plots):
            raise UserError(f"{plots}: exists already; choose another --plots")
    with progress() as show:
        show("reading the logs", 0, 0)
        found = read_runs(runs)
    page = out or (OF_SEVERAL if len(runs) > 1 else runs[0] / REPORT)
    taken: dict[str, ExpertTokens | None] = {}
    if tokens and any(run.config.model.moe_layers for run in found.values()):
        from mhmoe_np.report.expert_tokens import expert_tokens

        ops = load(backend, threads=threads)
        with progress("tokens") as show:
            for name, run in found.items():
                taken[name] = expert_tokens(run.folder, tokens=tokens, ops=ops, on_progress=show)
    with progress() as show:
        show("drawing the page", 0, 0)
        text = run_page(found, taken)
    write_atomically(page, lambda path: write_text(path, text))
    click.echo(page)
    if plots is not None:
        from mhmoe_np.report.plots import write_plots

        with progress("figures") as show:
            names = write_plots(plots, figures_of_runs(found), show)
        click.echo(f"{plots}: {len(names)} figures, each as PNG and SVG")
