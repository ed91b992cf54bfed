"""`mhmoe-np pack`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.new_directory import out_option
from mhmoe_cli.printing import print_json
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.operations.int8 import INT8
from mhmoe_np.operations.packing import FORMATS
from mhmoe_np.operations.table import BackendName


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@out_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice([*FORMATS, INT8]),
    help="Default: sign-1bit or ternary-2bit of a BitNet model (ternary-base3 is smaller and slower), "
    "int8 of any other.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@threads_option
@backend_option
def command(
    checkpoint: Path,
    out: Path,
    format_name: str | None,
    as_json: bool,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Pack a BitNet model's quantised weights to 1, 1.6 or 2 bits, or any model's weights to 8.

    CKPT is a checkpoint, or a run folder whose last one is taken. The new directory is a checkpoint
    that eval, generate, inspect and trace --no-grad take; the float weights are not in it. 1, 1.6 and 2
    bits give the same outputs to the bit; int8 (8-bit integers, a scale for each 32 of them) rounds
    weights and activations.
    """
    import numpy as np

    from mhmoe_np.audit.inspection import sizes
    from mhmoe_np.checkpoints.checkpoint import (
        find_checkpoint,
        find_tokenizer,
        is_packed,
        load_end_of_text,
        load_parameters,
        save_packed_model,
    )
    from mhmoe_np.model.packed import pack_int8, pack_weights
    from mhmoe_np.model.weights import formats_for
    from mhmoe_np.storage.files import write_directory_atomically

    found = find_checkpoint(checkpoint)
    if is_packed(found):
        raise UserError(f"{found}: is packed already; unpack it to choose another format")
    with progress("bytes") as show:
        parameters = load_parameters(found, np.float32, show)
    config, tokenizer, end_of_text = parameters.config, find_tokenizer(found), load_end_of_text(found)
    formats = [*formats_for(config), INT8]
    chosen = next((name for name in formats if format_name in (None, name)), None)
    if chosen is None:
        raise UserError(
            f"--format {format_name}: does not hold quantization {config.quantization!r}; "
            f"use {' or '.join(formats)}"
        )
    ops = load(backend, threads=threads)
    with progress("parameters") as show:
        if chosen == INT8:
            weights = pack_int8(parameters, ops=ops, on_progress=show)
        else:
            on_device = parameters.to_device(ops)
            weights = pack_weights(on_device, chosen, ops=ops, on_progress=show).to_host(ops)
        show(f"writing {out}", 0, 0)
        write_directory_atomically(
            out, lambda folder: save_packed_model(folder, config, weights, tokenizer, end_of_text)
        )
    rows = sizes(config, weights)
    if as_json:
        values = {name: size.as_dict() for name, size in rows.items()}
        print_json({"format": chosen, "sizes": values})
        return

    from rich.filesize import decimal

    click.echo(f"{out}: {chosen}")
    click.echo(f"{'':10s}{'weights':>14s}{'float32':>11s}{'packed':>11s}{'bits/weight':>13s}")
    for name, size in rows.items():
        click.echo(
            f"{name:10s}{size.weights:14,d}{decimal(size.float32_bytes, precision=2):>11s}"
            f"{decimal(size.packed_bytes, precision=2):>11s}{size.bits_per_weight:13.3f}"
        )
