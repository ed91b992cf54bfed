"""`mhmoe-np import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.progress import OnProgress

if TYPE_CHECKING:
    from mhmoe_np.exchange.foreign import Foreign


@click.command()
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@out_option
def command(source: Path, out: Path) -> None:
    """Read a model of another implementation, and write it as a checkpoint.

    SOURCE is a directory of Hugging Face transformers with safetensors files, or a .gguf file of
    llama.cpp. A model that computes something else than this package can is refused, and the line names
    the key or tensor. Nothing in SOURCE is executed.
    """
    from mhmoe_np.checkpoints.checkpoint import TOKENIZER, save_model
    from mhmoe_np.storage.files import write_directory_atomically

    with progress("parameters") as show:
        foreign = _read(source, show)
        show(f"writing {out}", 0, 0)
        write_directory_atomically(
            out,
            lambda folder: save_model(
                folder, foreign.parameters, foreign.tokenizer, foreign.end_of_text
            ),
        )
    click.echo(f"{out}: {foreign.parameters.count:,} parameters")
    if foreign.tokenizer is None:
        click.echo(f"{source}: has no {TOKENIZER}; eval and generate need one in {out}", err=True)


def _read(source: Path, on_progress: OnProgress) -> Foreign:
    if source.suffix == ".gguf":
        from mhmoe_np.exchange.gguf_import import import_gguf

        return import_gguf(source, on_progress=on_progress)
    if not source.is_dir():
        raise UserError(f"{source}: neither a directory nor a .gguf file; give one of them")
    from mhmoe_np.exchange.hf_import import import_hf

    return import_hf(source, on_progress=on_progress)
