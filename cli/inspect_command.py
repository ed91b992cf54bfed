"""`mhmoe-np inspect`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, threads_option
from mhmoe_cli.loading import load_with_model
from mhmoe_cli.printing import print_json
from mhmoe_cli.progress import progress
from mhmoe_np.operations.table import BackendName

ROOM = 74  # columns of all but the name


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@threads_option
@backend_option
def command(checkpoint: Path, as_json: bool, threads: int | None, backend: BackendName) -> None:
    """List every tensor of a checkpoint: shape, format, size; quantised ones with scale and shares.

    For a checkpoint that is not packed, scale and shares are what its weights quantise to.
    """
    import numpy as np

    from mhmoe_np.audit.inspection import inspect_weights
    from mhmoe_np.checkpoints.checkpoint import find_checkpoint

    found = find_checkpoint(checkpoint)
    ops, model = load_with_model(backend, found, np.float32, threads=threads)
    with progress() as show:
        show("looking at the weights", 0, 0)
        rows = inspect_weights(model.config, model.weights.to_host(ops))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    width = max(len(row.name) for row in rows)
    # Where a row has no room it begins with a line of its name alone.
    fits = not sys.stdout.isatty() or width + ROOM <= shutil.get_terminal_size().columns
    shapes = ["x".join(map(str, row.shape)) for row in rows]
    titles = f"  {'shape':>12s}  {'format':13s}{'bytes':>14s}"
    scales = f"{'scale':>10s}{'-1':>7s}{'0':>7s}{'+1':>7s}"
    click.echo(f"{'tensor':{width}s}{titles}{scales}" if fits else f"tensor\n{titles}{scales}")
    for row, shape in zip(rows, shapes, strict=True):
        name = f"{row.name:{width}s}" if fits else f"{row.name}\n"
        line = f"{name}  {shape:>12s}  {row.format:13s}{row.bytes:14,d}"
        if row.scale is not None:
            shares = "".join(f"{share:7.2%}" for share in (row.minus, row.zero, row.plus))
            line += f"{row.scale:10.6f}{shares}"
        click.echo(line)
    click.echo(f"{len(rows)} tensors, {sum(row.bytes for row in rows):,} bytes")
