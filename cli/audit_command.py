"""`mhmoe-np audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import backends_option, prepare
from mhmoe_cli.new_file import check_new_file
from mhmoe_cli.printing import console, print_json, show
from mhmoe_cli.progress import progress
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName

if TYPE_CHECKING:
    from mhmoe_np.report.report import Report


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page; a new file."
)
@backends_option
def command(as_json: bool, html: Path | None, backends: list[BackendName]) -> None:
    """Compute everything that is claimed, and hold it against its bounds.

    Every operation with its equation, source, cost and place: its gradient beside central differences,
    fast backends beside the definition, PyTorch and Hugging Face beside it where they are installed;
    every kind of model; the paper's table of equal cost. Exits with 1 if a claim fails.
    """
    if html is not None:
        check_new_file(html, option="--html")  # before minutes of work
    for name in backends:
        prepare(name)

    from mhmoe_np.report.report import make_report

    with progress() as show_progress:
        report = make_report(
            backends, load=load_operations, tell=lambda what: show_progress(what, 0, 0)
        )
    if html is not None:
        from mhmoe_np.report.page import page
        from mhmoe_np.storage.files import write_atomically, write_text

        text = page(report)
        write_atomically(html, lambda path: write_text(path, text))
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if not report.passed:
        raise click.exceptions.Exit(1)


def _print(report: Report) -> None:
    from rich.table import Table

    screen = console(least_width=110)
    titles = [column.title.replace(" ", "\n") for column in report.columns]
    operations = Table("operation", *titles, "", box=None)
    operations.columns[0].no_wrap = True
    for subject in report.operations:
        cells = [subject.at(column) for column in report.columns]
        errors = ["" if claim is None else claim.shown for claim in cells]
        operations.add_row(subject.name, *errors, subject.verdict)
    models = Table("model", *(f"{name} gradient" for name in _backends(report)), "", box=None)
    for subject in report.models:
        models.add_row(subject.name, *(claim.shown for claim in subject.claims), subject.verdict)
    parity = Table("model", "H", "E", "K", "F", "parameters", "MACs a token", "", box=None)
    for row, subject in zip(report.parity_rows, report.parity, strict=True):
        sizes = (row.heads, row.experts, row.top_k, row.intermediate_size)
        counts = f"{row.parameters:,}", f"{row.macs_per_token:,}"
        parity.add_row(row.name, *map(str, sizes), *counts, subject.verdict)
    for table in (operations, models, parity):
        show(screen, table)
        click.echo()
    for name in ("mhmoe-np", "processor", "threads", "python"):
        click.echo(f"{name}: {report.environment[name]}")
    for name, state in (report.backends | report.peers).items():
        click.echo(f"{name}: {state}")
    for subject in report.subjects:
        for claim in subject.claims:
            if not claim.passed:
                form = f"[{claim.case}]" if claim.case else ""
                click.echo(
                    f"FAILED  {subject.name}{form}, {claim.kind}, {claim.by} {claim.dtype}: "
                    f"{claim.error:.2e}, must be at most {claim.bound:.0e}; {claim.where}"
                )
    count = len(report.claims)
    failed = sum(not claim.passed for claim in report.claims)
    verdict = f"FAILED: {failed} of {count} claims" if failed else f"all {count} claims hold"
    click.echo(f"{verdict} ({report.seconds:.0f} s)")


def _backends(report: Report) -> list[str]:
    """Those whose gradients were checked."""
    return list(dict.fromkeys(claim.by for subject in report.models for claim in subject.claims))
