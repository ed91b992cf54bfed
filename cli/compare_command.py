"""`mhmoe-np compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.printing import console, print_json, printable, show
from mhmoe_cli.progress import progress
from mhmoe_np.errors import UserError

if TYPE_CHECKING:
    from mhmoe_np.comparison.causes import Finding
    from mhmoe_np.comparison.trace_file import Trace
    from mhmoe_np.comparison.two_traces import Comparison, Row

COLOURS = {"same": "green", "tie": "yellow", "different": "red"}


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="In the place of B: compute each layer of this model from A's own numbers, and name causes.",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path),
    help="A JSON object: a name in A or B -> the name in the specification.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, max=2),
    help="Of floats, against a tensor's largest magnitude (default: 1e-9 in float64, 2e-5 in float32).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    first: Path,
    second: Path | None,
    checkpoint: Path | None,
    names: Path | None,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Compare two traces, or a trace with a checkpoint, tensor by tensor; exit with 1 if they differ.

    A and B are .safetensors or .npz files with the names of SPECIFICATION.md section 8, as
    `mhmoe-np trace` writes them; docs/compare.md shows how PyTorch, JAX and C++ write one.
    """
    from mhmoe_np.comparison.trace_file import read_names, read_trace, renamed
    from mhmoe_np.comparison.two_traces import compare_traces

    if (second is None) == (checkpoint is None):
        raise UserError("compare: give a second trace or --checkpoint CKPT, one of the two")
    if tolerance is not None and math.isnan(tolerance):
        raise UserError("--tolerance nan: is no number; give one, as 1e-6")
    paths = [first] if second is None else [first, second]
    mapped = {} if names is None else read_names(names)
    traces = []
    with progress() as tell_progress:
        for path in paths:
            tell_progress(f"reading {path}", 0, 0)
            traces.append(read_trace(path))
    for name in mapped:
        if not any(name in trace for trace in traces):
            raise UserError(f"{names}: no trace has a tensor {name!r}; correct or remove the name")
    traces = [renamed(trace, mapped, source=path) for trace, path in zip(traces, paths, strict=True)]
    findings: list[Finding] = []
    if checkpoint is None:
        with progress() as tell_progress:
            tell_progress("comparing", 0, 0)
            comparison = compare_traces(*traces, tolerance=tolerance)
    else:
        comparison, findings = _against(traces[0], first, checkpoint, tolerance)
    if not comparison.rows:
        raise UserError(
            f"{first}: has no tensor to compare; see --names and SPECIFICATION.md section 8"
        )
    labels = "A", "B" if checkpoint is None else "computed"
    if as_json:
        _print_json(comparison, findings)
    else:
        _print_table(comparison, findings, labels)
    if comparison.first_difference is not None:
        raise click.exceptions.Exit(1)


def _against(
    trace: Trace, path: Path, checkpoint: Path, tolerance: float | None
) -> tuple[Comparison, list[Finding]]:
    import numpy as np

    from mhmoe_np.checkpoints.checkpoint import find_checkpoint, is_packed, load_parameters
    from mhmoe_np.comparison.causes import diagnose
    from mhmoe_np.operations.load import load_operations

    found = find_checkpoint(checkpoint)
    if is_packed(found):
        raise UserError(f"{found}: has packed weights; unpack it first (mhmoe-np unpack)")
    narrow = any(tensor.dtype == np.float32 for tensor in trace.values())
    with progress("bytes") as tell_progress:
        parameters = load_parameters(found, np.float32 if narrow else np.float64, tell_progress)
    ops = load_operations("numpy")
    with progress("layers") as tell_progress:
        diagnosis = diagnose(
            trace,
            parameters,
            source=str(path),
            tolerance=tolerance,
            ops=ops,
            on_progress=tell_progress,
        )
    return diagnosis.comparison, diagnosis.findings


def _print_json(comparison: Comparison, findings: list[Finding]) -> None:
    worst = comparison.first_difference
    print_json(
        {
            "same": worst is None,
            "first_difference": None if worst is None else worst.name,
            "findings": [finding._asdict() for finding in findings],
            "tensors": [row.as_dict() for row in comparison.rows],
            "only_first": comparison.only_first,
            "only_second": comparison.only_second,
        }
    )


def _print_table(comparison: Comparison, findings: list[Finding], labels: tuple[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    longest = max(len(row.name) for row in comparison.rows)
    screen = console(least_width=longest + 90)  # a line that is cut has lost its numbers
    table = Table(box=None if not screen.is_terminal else Table().box)
    table.add_column("tensor", no_wrap=True)
    for title in ("shape", "max abs", "max rel", "ULP", "1 - cos"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in comparison.rows:
        table.add_row(
            # As a Text: a plain string may hold the library's markup.
            Text(printable(row.name)),
            "x".join(map(str, row.shape)) or "1",
            *_figures(row),
            Text(row.verdict, style=COLOURS[row.verdict]),
        )
    show(screen, table)
    for row in comparison.rows:
        if row.verdict == "tie":
            click.echo(f"{printable(row.name)}: {row.note}")
    for label, names in zip(labels, (comparison.only_first, comparison.only_second), strict=True):
        if names and label != "computed":
            shown = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
            click.echo(f"only in {label}: {len(names)} tensors ({shown})")
    worst = comparison.first_difference
    if worst is None:
        click.echo(f"{len(comparison.rows)} tensors, all the same within tolerance")
    else:
        click.echo(f"first difference: {_worst_element(worst, labels)}")
    for finding in findings:
        said = {"cause": "cause: ", "tie": "no failure: ", "unexplained": ""}[finding.kind]
        click.echo(f"{printable(finding.where)}: {said}{finding.text}")
        if finding.operation:
            click.echo(f"    its first operation that differs: {printable(finding.operation)}")


def _figures(row: Row) -> list[str]:
    if row.difference is None:
        return [""] * 4
    found = row.difference
    ulp = "" if found.max_ulp is None else f"{found.max_ulp:,}" if found.max_ulp < 1e6 else "> 1e6"
    cosine = "" if found.cosine is None else f"{found.cosine:.1e}"
    return [f"{found.max_abs:.1e}", f"{found.max_rel:.1e}", ulp, cosine]


def _worst_element(row: Row, labels: tuple[str, str]) -> str:
    line = printable(row.name)
    if row.difference is not None:
        found = row.difference
        line += (
            f"{list(found.place)} = {found.first:.9g} in {labels[0]}, "
            f"{found.second:.9g} {_in(labels[1])} "
            f"({found.max_rel:.1e} of the largest, beyond {row.tolerance:.0e})"
        )
    return f"{line}; {row.note}" if row.note else line


def _in(label: str) -> str:
    return label if label == "computed" else f"in {label}"
