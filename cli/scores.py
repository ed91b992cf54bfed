"""Showing evaluation scores: a table for people, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from mhmoe_cli.printing import console, printable, show
from mhmoe_np.inference.evaluate import DomainScore

COLUMNS = {
    "token_ppl": "token ppl",
    "word_ppl": "word ppl",
    "byte_ppl": "byte ppl",
    "bits_per_byte": "bits/byte",
    "nll": "NLL (nats)",
    "tokens": "tokens",
    "words": "words",
    "bytes": "bytes",
}


def print_scores(scores: Mapping[str, DomainScore]) -> None:
    """A table on standard output; plain columns where that is no terminal."""
    screen = console(least_width=110)
    table = Table(box=None if not screen.is_terminal else Table().box)
    table.add_column("domain")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, score in scores.items():
        # As a Text: a plain string may hold the library's markup.
        table.add_row(Text(printable(name)), *(_figure(score.as_dict()[key]) for key in COLUMNS))
    show(screen, table)


def _figure(value: float | int | None) -> str:
    if value is None:
        return "overflow"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value > 1e5 else f"{value:.4f}"
    )
