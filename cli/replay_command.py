"""`mhmoe-np replay`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.progress import progress
from mhmoe_np.operations.table import BackendName


@click.command()
@click.argument("directory", metavar="DIRECTORY", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@threads_option
@backend_option
def command(directory: Path, as_json: bool, threads: int | None, backend: BackendName) -> None:
    """Repeat the step that ended a run, from the DIRECTORY that the run put aside.

    Names the first number that is not finite in weights and moments, then in the step itself: layer,
    operation and tensor. Nothing is changed.
    """
    from mhmoe_np.audit.replay import replay
    from mhmoe_np.checkpoints.failure import load_failure

    with progress("bytes") as show:
        failure = load_failure(directory, show)
    record = failure.record
    ops = load(backend, threads=threads)
    with progress() as show:
        show(f"repeating step {record.step}", 0, 0)
        found = replay(failure, ops=ops)
    if as_json:
        values = {
            "recorded": record.model_dump(),
            "batch": [list(part.shape) for part in failure.windows],
            "found": found.as_dict(),
        }
        click.echo(json.dumps(values, indent=2))
        return
    shapes = ", ".join(str(list(part.shape)) for part in failure.windows)
    click.echo(f"step {record.step}, micro-batches {shapes}")
    click.echo(f"settings: {_listed(record.settings._asdict())}")
    click.echo(f"recorded: {_listed(record.losses)}; {record.fault or 'no place named'}")
    for tensor in found.state:
        click.echo(f"state: {tensor}")
    if not found.state:
        click.echo("state: weights and moments are finite")
    for section, largest in found.step.hidden.items():
        click.echo(f"largest hidden state, {section}: {largest:.3g}")
    if found.step.result is None:
        click.echo(f"first not finite: {found.step.fault}")
    else:
        losses = {
            **found.step.result.losses._asdict(),
            "gradient_norm": found.step.result.gradient_norm,
        }
        click.echo(
            f"the step is finite when repeated: {_listed(losses)}"
            + ("" if found.state else "; try the backend and the processor that it failed on")
        )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
