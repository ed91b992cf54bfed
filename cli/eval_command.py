"""`mhmoe-np eval`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.backend import backend_option, threads_option
from mhmoe_cli.loading import load_with_model
from mhmoe_cli.printing import print_json
from mhmoe_cli.progress import progress
from mhmoe_cli.text_options import named, text_key_option
from mhmoe_np.inference.protocols import PROTOCOLS, ProtocolName, choose_protocol
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import LARGEST_SIZE


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="NAME=PATH",
    help="A text to score (default: the held-out text of CKPT's run).",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="disjoint",
    show_default=True,
    help="Which tokens are scored, given what; see docs/perplexity.md.",
)
@click.option(
    "--window",
    type=click.IntRange(1, LARGEST_SIZE),
    help="Tokens of a window (default: max_position_embeddings).",
)
@click.option(
    "--stride",
    type=click.IntRange(1, LARGEST_SIZE),
    help="With --protocol stride: tokens from window to window (default: half a window).",
)
@click.option(
    "--bos/--no-bos",
    default=None,
    help="Begin each window with a beginning of text (default: as the protocol's own program).",
)
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
    protocol: ProtocolName,
    window: int | None,
    stride: int | None,
    bos: bool | None,
    as_json: bool,
    batch_tokens: int,
    text_key: str,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Score texts with a checkpoint: the last one of a run folder, or RUN/checkpoints/best.

    A domain's PATH is a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder or a glob.
    Perplexities compare where protocol, window, stride, beginning of text, tokenizer and corpus are
    the same: --json has them all.
    """
    import numpy as np

    from mhmoe_cli.scores import print_scores
    from mhmoe_np.checkpoints.checkpoint import find_checkpoint, load_checkpoint_tokenizer
    from mhmoe_np.data.read_file import TEXT_KEY
    from mhmoe_np.data.tokenised_text import tokenise_text
    from mhmoe_np.errors import UserError
    from mhmoe_np.inference.evaluate import evaluate, scores_as_dict
    from mhmoe_np.storage.checksums import CHECKSUMS
    from mhmoe_np.training.run_folder import held_out_domains, run_of

    path_of_domain = named(domains, option="--domain", value="PATH")
    found = find_checkpoint(checkpoint)
    if not path_of_domain:
        run = run_of(found)
        path_of_domain, text_key = held_out_domains(run), TEXT_KEY
        if not path_of_domain:
            path = run / CHECKSUMS
            raise UserError(
                f"{path}: missing, or without held-out text; name one with --domain NAME=PATH"
            )
    with progress("bytes") as show:
        tokenizer = load_checkpoint_tokenizer(found, show)
        texts = [
            tokenise_text(name, path, tokenizer, text_key=text_key, on_progress=show)
            for name, path in path_of_domain.items()
        ]
    ops, model = load_with_model(backend, found, np.float32, threads=threads, keep_buffers=True)
    chosen = choose_protocol(protocol, model.config, tokenizer, window=window, stride=stride, bos=bos)
    with progress("tokens") as show:
        scores = {
            text.name: evaluate(
                model, text, ops=ops, protocol=chosen, batch_tokens=batch_tokens, on_progress=show
            )
            for text in texts
        }
    if as_json:
        print_json(scores_as_dict(scores, chosen, tokenizer))
    else:
        print_scores(scores)
