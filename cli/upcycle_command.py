"""`mhmoe-np upcycle`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.new_directory import out_option
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError
from mhmoe_np.settings.model import LARGEST_COUNT, LARGEST_SIZE
from mhmoe_np.settings.presets import PAPER_MODELS

COUNT = click.IntRange(1, LARGEST_SIZE)


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--preset-like",
    type=click.Choice([name for name in PAPER_MODELS if name != "dense"]),
    help="Experts as those of this model of the paper; the options below change one or the other.",
)
@click.option("--experts", type=COUNT, help="Experts of each layer that gets some.")
@click.option("--top-k", type=COUNT, help="Experts chosen for each token.")
@click.option(
    "--split",
    type=COUNT,
    help="Cut each network into so many experts along its inner width, instead of copying it.  "
    "[default: 1]",
)
@click.option("--heads", type=COUNT, help="Above 1: an MH-MoE.  [default: 1]")
@click.option(
    "--inner-width",
    type=COUNT,
    help="Of each expert of an MH-MoE.  [default: the dense network's]",
)
@click.option("--step", type=COUNT, help="Every which layer gets experts.  [default: 2]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, LARGEST_COUNT))
@out_option
def command(
    checkpoint: Path,
    preset_like: str | None,
    experts: int | None,
    top_k: int | None,
    seed: int,
    out: Path,
    **others: int | None,
) -> None:
    """Make a mixture of experts of a dense model, as the start of further training (train --init).

    At first it computes what the dense model computes: experts are copies of a layer's network, or,
    with --split, its pieces, and the gates of those chosen sum to 1. Not so with --heads: head and
    merge layers start as the identity and the experts are fresh.
    """
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import (
        find_checkpoint,
        find_tokenizer,
        is_packed,
        load_end_of_text,
        load_parameters,
        save_model,
    )
    from mhmoe_np.exchange.upcycle import Experts, upcycle
    from mhmoe_np.settings.presets import MODEL_PRESETS
    from mhmoe_np.storage.files import write_directory_atomically

    if not preset_like and not (experts and top_k):
        raise UserError("--experts and --top-k: give both, or --preset-like")
    found = find_checkpoint(checkpoint)
    if is_packed(found):
        raise UserError(f"{found}: is packed; unpack it first")
    with progress("bytes") as show:
        dense = load_parameters(found, np.float32, show)
    given = {"num_experts": experts, "num_experts_per_tok": top_k, **others}
    changes = {name: value for name, value in given.items() if value}
    wanted = (
        Experts.like(MODEL_PRESETS[f"paper-{preset_like}"], dense.config)._replace(**changes)
        if preset_like
        else Experts(**changes)
    )
    tokenizer, end_of_text = find_tokenizer(found), load_end_of_text(found)
    with progress("layers") as show:
        parameters = upcycle(dense, wanted, seed=seed, on_progress=show)
        show(f"writing {out}", 0, 0)
        write_directory_atomically(
            out, lambda folder: save_model(folder, parameters, tokenizer, end_of_text)
        )
    config = parameters.config
    click.echo(
        f"{out}: {parameters.count:,} parameters, "
        f"{config.num_experts} experts in {config.moe_layers} of {config.num_hidden_layers} layers"
    )
    click.echo(
        "It computes what the dense model computes, to rounding."
        if wanted.keep_function
        else "It does NOT compute what the dense model computes: its experts are fresh. Train it."
    )
