"""`mhmoe-np tokenizer train|inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from mhmoe_cli.new_file import check_new_file
from mhmoe_cli.printing import console, print_json, printable, show
from mhmoe_cli.progress import progress
from mhmoe_cli.text_options import named, text_key_option


@click.group()
def command() -> None:
    """Train a byte-level BPE tokenizer on text, or look at any tokenizer.json."""


@command.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The tokenizer.json to make."
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), default=32768, show_default=True, help="At most."
)
@click.option(
    "--special",
    "special_tokens",
    multiple=True,
    metavar="TOKEN",
    help="A special token beside the end of text; repeatable.",
)
@text_key_option
def train(
    paths: tuple[str, ...],
    out: Path,
    vocab_size: int,
    special_tokens: tuple[str, ...],
    text_key: str,
) -> None:
    """Train a tokenizer on text; on a sample from all over it where it has more than 16 MB.

    A PATH is a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder or a glob.
    """
    check_new_file(out, option="--out")
    from mhmoe_np.data.sample import train_on_sources
    from mhmoe_np.data.sources import find_sources
    from mhmoe_np.data.tokenizer import id_count, save_tokenizer
    from mhmoe_np.storage.files import write_atomically

    sources = find_sources(paths)
    with progress("bytes") as tell_progress:
        tokenizer = train_on_sources(
            sources,
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            text_key=text_key,
            on_progress=tell_progress,
        )
    write_atomically(out, lambda path: save_tokenizer(tokenizer, path))
    click.echo(f"{out}: {id_count(tokenizer):,} tokens")


@command.command()
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="NAME=PATH",
    help="Text to try it on; repeatable (default: the embedded corpus).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@text_key_option
def inspect(tokenizer: Path, domains: tuple[str, ...], as_json: bool, text_key: str) -> None:
    """Show a tokenizer's size, special tokens, and how many tokens it takes for text of each domain."""
    from mhmoe_np.data.fertility import fertility
    from mhmoe_np.data.sources import find_sources
    from mhmoe_np.data.tokenizer import id_count, load_tokenizer, special_tokens, tokenizer_sha256
    from mhmoe_np.progress import counting

    loaded = load_tokenizer(tokenizer)
    sources = find_sources([], named(domains, option="--domain", value="PATH"))
    found = {}
    with progress("bytes") as tell_progress:
        for source in sources:
            on_bytes = counting(tell_progress, f"encoding {source.name}", source.size)
            found[source.name] = fertility(loaded, source, text_key=text_key, on_bytes=on_bytes)
    if as_json:
        print_json(
            {
                "vocab_size": id_count(loaded),
                "sha256": tokenizer_sha256(loaded),
                "special_tokens": special_tokens(loaded),
                "domains": {
                    name: {
                        **one._asdict(),
                        "tokens_per_word": one.tokens_per_word,
                        "bytes_per_token": one.bytes_per_token,
                    }
                    for name, one in found.items()
                },
            }
        )
        return
    click.echo(f"vocabulary {id_count(loaded):,}")
    for name, number in special_tokens(loaded).items():
        click.echo(f"special token {number}: {printable(name)}")
    from rich.table import Table

    table = Table(box=None)
    table.add_column("domain")
    for title in ("tokens", "words", "bytes", "tokens/word", "bytes/token"):
        table.add_column(title, justify="right")
    for name, one in found.items():
        table.add_row(
            printable(name),
            *(f"{count:,}" for count in one),
            f"{one.tokens_per_word:.3f}",
            f"{one.bytes_per_token:.3f}",
        )
    show(console(least_width=72), table)
