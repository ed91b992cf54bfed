"""`mhmoe-np gradcheck`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import backends_option, load
from mhmoe_cli.printing import print_json
from mhmoe_cli.progress import progress
from mhmoe_np.operations.table import BackendName
from mhmoe_np.progress import unseen

if TYPE_CHECKING:
    from mhmoe_np.audit.derivative import GradientCheck


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@backends_option
def command(as_json: bool, backends: list[BackendName]) -> None:
    """Check every operation and whole models against central differences in float64.

    Prints the worst relative error of each and its bound, and where one is exceeded the argument or
    tensor and the entry of its gradient that is farthest off; then exits with 1.
    """
    from mhmoe_np.audit.gradcheck import check_all

    checks: list[GradientCheck] = []
    quiet = as_json or not sys.stdout.isatty()  # else its lines show how far it is
    with progress() if quiet else nullcontext(unseen) as show:
        for name in backends:
            for check in check_all(load(name)):
                checks.append(check._replace(name=f"{name}: {check.name}"))
                show(f"{name}: checking gradients", len(checks), 0)
                if not as_json:
                    _print(checks[-1])
    if as_json:
        print_json([check.as_dict() for check in checks])
    if not all(check.passed for check in checks):
        raise click.exceptions.Exit(1)


def _print(check: GradientCheck) -> None:
    verdict = "ok" if check.passed else "FAILED"
    click.echo(f"{check.name:60s} {check.max_rel_error:9.2e} <= {check.bound:.0e}  {verdict}")
    if check.entry is not None:
        place, numeric, analytic = check.entry
        click.echo(
            f"    {check.argument}{list(place)}: {numeric:.10g} by differences, "
            f"{analytic:.10g} by the backward"
        )
