"""`mhmoe-np trace`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, threads_option
from mhmoe_cli.loading import load_with_model
from mhmoe_cli.new_file import check_new_file
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    required=True,
    type=click.Path(path_type=Path),
    help="A .npy or JSON array of ids, [B, T+1]; -100 is padding at a row's right end.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new .safetensors file.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True
)
@click.option("--no-grad", is_flag=True, help="Leave out targets, losses and gradients.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help='Write the tensors of such names alone, as "layers.0.*"; may be given again.',
)
@click.option("--stop-at", metavar="NAME", help="Compute and write nothing after this tensor.")
@click.option(
    "--operations", is_flag=True, help="Write the operands and results of every operation as well."
)
@threads_option
@backend_option
def command(
    checkpoint: Path,
    tokens: Path,
    out: Path,
    dtype: str,
    no_grad: bool,
    only: tuple[str, ...],
    stop_at: str | None,
    operations: bool,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Run one forward and backward and write every tensor: inputs, activations, losses, gradients."""
    from mhmoe_np.audit.recorder import Wanted
    from mhmoe_np.audit.trace import read_tokens, trace
    from mhmoe_np.checkpoints.checkpoint import find_checkpoint, is_packed
    from mhmoe_np.storage.tensors import save_tensors

    check_new_file(out, option="--out")
    found = find_checkpoint(checkpoint)
    if is_packed(found) and not no_grad:
        raise UserError(
            f"{found}: packed weights have no gradients; give --no-grad, or unpack it first"
        )
    ops, model = load_with_model(backend, found, dtype, threads=threads)
    token_ids = read_tokens(
        tokens,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    )
    wanted = Wanted(only, stop_at, operations)
    with progress() as show:
        show("computing", 0, 0)
        tensors = trace(model, token_ids, gradients=not no_grad, wanted=wanted, ops=ops)
        show(f"writing {out}", 0, 0)
        save_tensors(out, tensors)
    click.echo(f"{out}: {len(tensors)} tensors")
