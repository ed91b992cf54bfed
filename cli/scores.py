"""Showing evaluation scores: a table for people, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mhmoe_cli.printing import console, printable, show
from mhmoe_np.inference.evaluate import DomainScore

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "token_ppl": "token ppl",
    "token_ppl_standard_error": "±",
    "bits_per_byte": "bits/byte",
    "word_ppl": "word ppl",
    "byte_ppl": "byte ppl",
    "nll": "NLL (nats)",
    "tokens": "tokens",
    "words": "words",
    "bytes": "bytes",
}
WIDTH_IN_A_FILE = 200  # where nobody's screen ends a line


def print_scores(scores: Mapping[str, DomainScore]) -> None:
    """A table on standard output; plain columns where that is no terminal.

    On a narrow screen it goes on below, as many columns at a time as fit.
    """
    screen = console(least_width=1 if console().is_terminal else WIDTH_IN_A_FILE)
    columns = list(COLUMNS)
    while columns:
        count = len(columns)
        while count > 1 and _width(screen, _table(screen, scores, columns[:count])) > screen.width:
            count -= 1
        show(screen, _table(screen, scores, columns[:count]))
        columns = columns[count:]


def _table(screen: Console, scores: Mapping[str, DomainScore], columns: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD if screen.is_terminal else None, pad_edge=False)
    table.add_column("domain", max_width=max(12, screen.width // 5), overflow="fold")
    for key in columns:
        table.add_column(COLUMNS[key], justify="right", no_wrap=True)
    for name, score in scores.items():
        values = score.as_dict()
        # As a Text: a plain string may hold the library's markup.
        table.add_row(Text(printable(name)), *(_figure(key, values) for key in columns))
    return table


def _width(screen: Console, table: Table) -> int:
    return table.__rich_measure__(screen, screen.options.update(width=WIDTH_IN_A_FILE)).maximum


def _figure(key: str, values: Mapping[str, Any]) -> str:
    value = values[key]
    if value is None:
        return "overflow" if values["whole_text"] and key.endswith("ppl") else "-"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value > 1e5 else f"{value:.4f}"
    )
