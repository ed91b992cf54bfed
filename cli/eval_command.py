"""`mhmoe-np eval`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, load, threads_option
from mhmoe_cli.printing import print_json
from mhmoe_cli.text_options import named, text_key_option
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import LARGEST_SIZE


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("--domain", "domains", multiple=True, required=True, metavar="NAME=PATH")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(1, LARGEST_SIZE),
    default=4096,
    show_default=True,
    help="About how many tokens go through the model at once.",
)
@text_key_option
@threads_option
@backend_option
def command(
    checkpoint: Path,
    domains: tuple[str, ...],
    as_json: bool,
    batch_tokens: int,
    text_key: str,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Score texts with a checkpoint, or with the last checkpoint of a run folder.

    A domain's PATH is a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder or a glob.
    Windows are disjoint and max_position_embeddings long; every token after the first is scored once.
    """
    import numpy as np

    from mhmoe_cli.scores import print_scores
    from mhmoe_np.checkpoints.checkpoint import find_checkpoint, load_checkpoint_tokenizer, load_model
    from mhmoe_np.data.documents import read_domain
    from mhmoe_np.inference.evaluate import evaluate

    path_of_domain = named(domains, option="--domain", value="PATH")
    found = find_checkpoint(checkpoint)
    texts = [read_domain(name, path, text_key=text_key) for name, path in path_of_domain.items()]
    tokenizer = load_checkpoint_tokenizer(found)
    ops = load(backend, threads=threads, keep_buffers=True)
    model = load_model(found, np.float32, ops=ops)
    scores = {
        text.name: evaluate(model, text, tokenizer, ops=ops, batch_tokens=batch_tokens)
        for text in texts
    }
    if as_json:
        values = {name: score.as_dict() for name, score in scores.items()}
        print_json({"domains": values})
    else:
        print_scores(scores)
