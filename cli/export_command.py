"""`mhmoe-np export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName

if TYPE_CHECKING:
    from mhmoe_np.exchange.bit_linear import LinearClass
    from mhmoe_np.model.parameters import Parameters
    from mhmoe_np.operations.table import Operations


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    required=True,
    type=click.Choice(["hf", "gguf"]),
    help="For Hugging Face transformers, or for llama.cpp (DIR/model.gguf).",
)
@out_option
@click.option(
    "--own-class",
    is_flag=True,
    help="hf: with this package's PyTorch file even where transformers has a class.",
)
@click.option(
    "--packed",
    type=click.Choice(["autobitlinear", "bitlinear"]),
    help="hf: BitNet's weights in 2 bits, for this class of linear layers; default: floats.",
)
@threads_option
@backend_option
def command(
    checkpoint: Path,
    format_name: Literal["hf", "gguf"],
    out: Path,
    own_class: bool,
    packed: LinearClass | None,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Write a checkpoint for another implementation.

    CKPT is a checkpoint, packed or not, or a run folder whose last one is taken. For transformers it
    becomes the class that computes the same (Llama, Mixtral, Qwen2-MoE, GraniteMoeShared, BitNet).
    MH-MoE has none and comes with a PyTorch file, to be loaded with trust_remote_code.
    """
    from mhmoe_np.checkpoints.checkpoint import find_checkpoint, find_tokenizer, load_end_of_text
    from mhmoe_np.storage.files import write_directory_atomically

    if format_name == "gguf" and (own_class or packed is not None):
        raise UserError("--format gguf: takes neither --own-class nor --packed; leave them out")
    found = find_checkpoint(checkpoint)
    ops = load(backend, threads=threads)
    parameters = _float_parameters(found, ops)
    tokenizer, end_of_text = find_tokenizer(found), load_end_of_text(found)
    if format_name == "gguf":
        from mhmoe_np.exchange.gguf_export import export_gguf

        with progress("parameters") as show:
            write_directory_atomically(
                out,
                lambda folder: export_gguf(
                    parameters,
                    tokenizer,
                    folder / "model.gguf",
                    end_of_text=end_of_text,
                    on_progress=show,
                ),
            )
        click.echo(f"{out}: model.gguf")
        return
    from mhmoe_np.exchange.hf_export import exported_as, write_hf

    model = exported_as(parameters.config, ours=own_class, packed=packed)
    with progress() as show:
        show(f"writing {out}", 0, 0)
        write_directory_atomically(
            out,
            lambda folder: write_hf(folder, model, parameters, tokenizer, end_of_text, ops=ops),
        )
    click.echo(f"{out}: {model.hf_class.architecture}")


def _float_parameters(checkpoint: Path, ops: Operations) -> Parameters:
    """The float weights of a checkpoint; of a packed one such as quantise to it [D11]."""
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import is_packed, load_model, load_parameters
    from mhmoe_np.model.packed import unpack_weights

    with progress("bytes") as show:
        if not is_packed(checkpoint):
            return load_parameters(checkpoint, np.float32, show)
        model = load_model(checkpoint, np.float32, ops=ops, on_progress=show)
    with progress("parameters") as show:
        return unpack_weights(model.config, model.weights, ops=ops, on_progress=show)
