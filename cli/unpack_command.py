"""`mhmoe-np unpack`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, threads_option
from mhmoe_cli.loading import load_with_model
from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName


@click.command()
@click.argument("checkpoint", metavar="PACKED", type=click.Path(path_type=Path))
@out_option
@threads_option
@backend_option
def command(checkpoint: Path, out: Path, threads: int | None, backend: BackendName) -> None:
    """Write a packed checkpoint as an ordinary float32 one: the same model, to the bit.

    The weights that were trained are gone: in their place stand such ones as quantise to the packed
    integers and scales again. Packing the result gives the packed file again. Weights of int8 become
    integer times scale; as floats they meet activations that are not rounded to 8 bits.
    """
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import (
        PACKED_WEIGHTS,
        find_checkpoint,
        find_tokenizer,
        is_packed,
        load_end_of_text,
        save_model,
    )
    from mhmoe_np.model.packed import packed_format, unpack_int8, unpack_weights
    from mhmoe_np.operations.int8 import INT8
    from mhmoe_np.storage.files import write_directory_atomically

    found = find_checkpoint(checkpoint)
    if not is_packed(found):
        raise UserError(f"{found}: is not packed: it has no {PACKED_WEIGHTS}")
    ops, model = load_with_model(backend, found, np.float32, threads=threads)
    tokenizer, end_of_text = find_tokenizer(found), load_end_of_text(found)
    with progress("parameters") as show:
        unpack = unpack_int8 if packed_format(model.weights) == INT8 else unpack_weights
        parameters = unpack(model.config, model.weights, ops=ops, on_progress=show)
        show(f"writing {out}", 0, 0)
        write_directory_atomically(
            out, lambda folder: save_model(folder, parameters, tokenizer, end_of_text)
        )
    click.echo(f"{out}: {parameters.count:,} parameters")
