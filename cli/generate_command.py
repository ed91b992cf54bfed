"""`mhmoe-np generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import backend_option, threads_option
from mhmoe_cli.loading import load_with_model
from mhmoe_cli.printing import print_json, visible
from mhmoe_cli.progress import print_part, progress, tell
from mhmoe_np.errors import UserError
from mhmoe_np.operations.table import BackendName
from mhmoe_np.settings.model import LARGEST_COUNT, LARGEST_SIZE
from mhmoe_np.storage.reading import LARGEST, decoded

if TYPE_CHECKING:
    from mhmoe_np.inference.generate import Generation, Texts
    from mhmoe_np.model.head import HeadDtype


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "given",
    multiple=True,
    metavar="TEXT",
    help="Text to continue; empty: start a new text; -: standard input. Repeatable.",
)
@click.option(
    "--prompts",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Texts to continue: .txt, one a line, or .jsonl with "prompt".',
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--stop", multiple=True, metavar="STRING", help="End a text before this string. Repeatable."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the K most probable tokens.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the nucleus of mass P."
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    help="Draw from tokens at least P times as probable as the most probable one.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: tokens of prompt and text become less probable.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, LARGEST_COUNT),
    default=0,
    show_default=True,
    help="Of the first text; each further one has the next.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, LARGEST_SIZE),
    default=16,
    show_default=True,
    help="Texts that are made at once.",
)
@click.option(
    "--head-dtype",
    type=click.Choice(["float32", "bfloat16", "int8", "exact"]),
    default="float32",
    show_default=True,
    help="Numbers of the output head; exact: float32's tokens by int8's speed, where they are the most "
    "probable ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of texts.")
@threads_option
@backend_option
def command(
    checkpoint: Path,
    given: tuple[str, ...],
    file: Path | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
    batch_size: int,
    head_dtype: HeadDtype,
    as_json: bool,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Continue prompts. A single one's text is printed as it is made.

    Temperature 0 takes the most probable token. Otherwise the steps are those of transformers, in its
    order: repetition penalty, temperature, top-k, top-p, min-p.
    """
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import (
        find_checkpoint,
        load_checkpoint_tokenizer,
        load_end_of_text,
    )
    from mhmoe_np.inference.generate import (
        Generation,
        Limits,
        check_head,
        generate_all,
        head_of,
        prompt_of,
    )
    from mhmoe_np.inference.prompts import check_text
    from mhmoe_np.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    sampling.check()
    check_head(head_dtype, sampling)
    for text in stop:
        check_text(text, "--stop")
    prompts = _prompts(given, file)
    found = find_checkpoint(checkpoint)
    tokenizer, ends = load_checkpoint_tokenizer(found), load_end_of_text(found)
    limits = Limits(max_new_tokens, stop, ends)
    ops, model = load_with_model(backend, found, np.float32, threads=threads, keep_buffers=True)
    head = head_of(model, head_dtype, sampling, ops=ops)
    if len(prompts) == 1 and not as_json:
        prompt = prompt_of(prompts[0], tokenizer, sampling, end_of_text=ends, config=model.config)
        generation = Generation(model, tokenizer, [prompt], limits=limits, head=head, ops=ops)
        _stream(prompts[0], generation)
        return
    with progress("tokens") as show:
        texts = generate_all(
            model,
            tokenizer,
            prompts,
            limits=limits,
            sampling=sampling,
            batch_size=batch_size,
            head=head,
            on_progress=show,
            ops=ops,
        )
    if as_json:
        print_json(_as_dict(texts))
    else:
        for i, made in enumerate(texts.continuations, 1):
            click.echo(f"--- {i} of {len(prompts)} ---")
            _print(f"{made.prompt}{made.text}\n")
    _tell_speed(texts.tokens, texts.seconds)


def _prompts(given: tuple[str, ...], file: Path | None) -> list[str]:
    from mhmoe_np.inference.prompts import check_text, read_prompts

    if not given and file is None:
        raise UserError("generate: has no prompt; give --prompt TEXT, --prompt - or --prompts FILE")
    if given.count("-") > 1:
        raise UserError("--prompt -: standard input can be read once; give it once")
    prompts = [_standard_input() if text == "-" else text for text in given]
    for text in prompts:
        check_text(text, "--prompt")
    return prompts + ([] if file is None else read_prompts(file))


def _standard_input() -> str:
    """All of it, without the line break that ends its last line."""
    content = sys.stdin.buffer.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"--prompt -: standard input has more than {LARGEST:,} bytes; shorten it")
    return decoded(content, source="--prompt -: standard input").removesuffix("\n").removesuffix("\r")


def _stream(prompt: str, generation: Generation) -> None:
    _print(prompt)
    started = time.perf_counter()
    while not generation.finished:
        (piece,) = generation.step()
        _print(piece)
    seconds = time.perf_counter() - started
    print_part("\n")
    _tell_speed(len(generation.continuations[0].token_ids), seconds)


def _print(text: str) -> None:
    """A terminal is given no control characters; a file or a pipe gets the text as it is."""
    print_part(visible(text) if sys.stdout.isatty() else text)


def _tell_speed(tokens: int, seconds: float) -> None:
    tell(f"{tokens:,} tokens: {seconds:.3g} s, {tokens / seconds:,.1f} tokens/s")


def _as_dict(texts: Texts) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "continuations": [asdict(made) for made in texts.continuations],
        "tokens": texts.tokens,
        "seconds": texts.seconds,
        "tokens_per_s": texts.tokens_per_s,
    }
