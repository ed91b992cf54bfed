"""`mhmoe-np generate`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import LARGEST_COUNT


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue; empty: start a new text.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the K most probable tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the nucleus of mass P."
)
@click.option("--seed", type=click.IntRange(0, LARGEST_COUNT), default=0, show_default=True)
@threads_option
@backend_option
def command(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Continue a prompt, printing text as it is made. Temperature 0 takes the most probable token."""
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import (
        find_checkpoint,
        load_checkpoint_tokenizer,
        load_end_of_text,
        load_model,
    )
    from mhmoe_np.inference.generate import Sampling, generate

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: is not UTF-8; convert it") from None
    found = find_checkpoint(checkpoint)
    tokenizer = load_checkpoint_tokenizer(found)
    ops = load(backend, threads=threads, keep_buffers=True)
    model = load_model(found, np.float32, ops=ops)
    pieces = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        end_of_text=load_end_of_text(found),
        ops=ops,
    )
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
