"""`mhmoe-np prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.new_directory import out_option
from mhmoe_cli.printing import print_json
from mhmoe_cli.progress import progress
from mhmoe_cli.text_options import lines_in_both_text, named, text_key_option
from mhmoe_np.errors import Interrupted, UserError

if TYPE_CHECKING:
    from mhmoe_np.data.store import StoreHeader


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--domain", "domains", multiple=True, metavar="NAME=PATH", help="Text with a name; repeatable."
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="A domain's share of each batch, relative to the others'; repeatable. Default: by size.",
)
@out_option
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json (default: train one)."
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), help="Of the tokenizer that is trained (32768)."
)
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Of each domain's bytes that are held out.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the split.")
@text_key_option
@click.option("--workers", type=click.IntRange(min=1), help="Processes (default: one for each core).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(
    paths: tuple[str, ...],
    domains: tuple[str, ...],
    weights: tuple[str, ...],
    out: Path,
    tokenizer: Path | None,
    vocab_size: int | None,
    validation_fraction: float,
    seed: int,
    text_key: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Tokenise text into a store that `train --data` takes.

    A PATH is a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder, a glob, or a token file
    of nanoGPT, llm.c or Megatron (.bin; needs --tokenizer). Each PATH is a domain; --domain gives it a
    name. Memory does not grow with the text. Interrupted, it goes on where it was when called again.
    """
    if tokenizer is not None and vocab_size is not None:
        raise UserError("--vocab-size: is of a tokenizer that is trained; leave it or --tokenizer away")
    if not paths and not domains:
        raise UserError("prepare: no text was named; give a PATH or --domain NAME=PATH")
    numbers = named(weights, option="--weight", value="NUMBER")
    shares = {name: _number(name, text) for name, text in numbers.items()}

    from mhmoe_np.data.prepare import PreparationSettings, is_unfinished, prepare_store
    from mhmoe_np.data.sources import find_sources
    from mhmoe_np.data.tokenizer import DEFAULT_VOCAB_SIZE, check_saves, load_tokenizer
    from mhmoe_np.operations.load import cores
    from mhmoe_np.storage.files import temporary_of

    sources = find_sources(paths, named(domains, option="--domain", value="PATH"))
    given = None
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        check_saves(given, str(tokenizer))
    settings = PreparationSettings(
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        validation_fraction=validation_fraction,
        seed=seed,
        text_key=text_key,
        weights=shares,
    )
    try:
        with progress("bytes") as show:
            header = prepare_store(
                out,
                sources,
                settings,
                tokenizer=given,
                workers=workers or cores(),
                on_progress=show,
            )
    except Interrupted:
        if is_unfinished(temporary_of(out)):
            click.echo(
                f"what is done so far is kept in {temporary_of(out)}; the same command goes on with it",
                err=True,
            )
        raise
    if as_json:
        print_json(header.model_dump())
    else:
        _print(header, out)


def _number(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1e30:
        raise UserError(f"--weight {name[:60]}={text[:60]}: must be a number above 0")
    return weight


def _print(header: StoreHeader, out: Path) -> None:
    for domain in header.domains:
        share = "" if domain.weight is None else f"  weight {domain.weight:g}"
        click.echo(
            f"{domain.name}: {domain.documents:,} documents, {domain.tokens:,} tokens, "
            f"{domain.held_out_documents:,} documents held out{share}"
        )
    if header.lines_in_both.held_out_lines:
        click.echo(lines_in_both_text(header.lines_in_both))
    click.echo(f"{out}: {header.tokens:,} tokens, vocabulary {header.vocab_size:,}")
    click.echo(f"next: mhmoe-np train --data {out} --set model.vocab_size={header.vocab_size}")
