"""`mhmoe-np init`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress
from mhmoe_np.settings.model import LARGEST_COUNT


@click.command()
@click.argument("config", metavar="CONFIG.json", type=click.Path(path_type=Path))
@out_option
@click.option("--seed", required=True, type=click.IntRange(0, LARGEST_COUNT))
def command(config: Path, out: Path, seed: int) -> None:
    """Write a checkpoint with random weights: a pure function of the configuration and the seed.

    It has no checksums: its files may be replaced by your own.
    """
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import write_model_files
    from mhmoe_np.model.parameters import Parameters, initialise
    from mhmoe_np.model.room import check_room
    from mhmoe_np.settings.model import read_model_config
    from mhmoe_np.storage.files import write_directory_atomically

    model = read_model_config(config)
    check_room(model, copies=1, source=str(config))
    parameters = Parameters(model, np.float32)
    with progress("bytes") as show:
        initialise(parameters, seed, show)
        show(f"writing {out}", 0, 0)
        write_directory_atomically(out, lambda folder: write_model_files(folder, parameters, None))
    click.echo(f"{out}: {parameters.count:,} parameters")
