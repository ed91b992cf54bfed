"""Showing evaluation scores: a table for people, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

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
    console = Console()
    table = Table(box=None if not console.is_terminal else Table().box)
    table.add_column("domain")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, score in scores.items():
        table.add_row(name, *(_figure(score.as_dict()[key]) for key in COLUMNS))
    console.width = max(console.width, 110)
    console.print(table)


def _figure(value: float | int | None) -> str:
    if value is None:
        return "overflow"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value > 1e5 else f"{value:.4f}"
    )
