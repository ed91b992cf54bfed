"""`mhmoe-np vectors`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress


@click.command()
@out_option
@click.option(
    "--fresh", is_flag=True, help="Compute them on this machine instead of copying the shipped ones."
)
def command(out: Path, fresh: bool) -> None:
    """Write the conformance vectors of this version, with a script that checks a port against them.

    Of every operation and every kind of model: inputs, results and gradients, and how far from them an
    honest implementation may be. The folder's README.md says how to use them.
    """
    from mhmoe_np.conformance.folder import compute_anew, copy_shipped, count
    from mhmoe_np.storage.files import write_directory_atomically

    with progress("vectors") as show:
        fill = partial(compute_anew, on_progress=show) if fresh else copy_shipped
        write_directory_atomically(out, fill)
    click.echo(f"{out}: {count(out)} vectors; check a port with: python {out}/check_vectors.py RESULTS")
