"""`mhmoe-np plan`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhmoe_cli.backend import backend_option, prepare, threads_option
from mhmoe_cli.printing import console, duration, print_json, show
from mhmoe_cli.progress import progress
from mhmoe_cli.run_settings import option_tables, preset_option, resolved_config, set_option
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName

if TYPE_CHECKING:
    from mhmoe_np.costs.plan import Plan


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@preset_option
@click.option(
    "--data", multiple=True, metavar="PATH", help="Text file, folder, glob or store; repeatable."
)
@click.option("--steps", type=int, help="Optimiser steps.")
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@threads_option
@backend_option
def command(
    config: Path | None,
    preset: str | None,
    data: tuple[str, ...],
    steps: int | None,
    settings: tuple[str, ...],
    as_json: bool,
    threads: int | None,
    backend: BackendName,
) -> None:
    """Forecast what `train` with the same settings will take; nothing is written.

    Parameters, FLOPs a token, memory by part, tokens/s, time and disk. A few steps of the model show
    how fast this machine is and how much memory they need.
    """
    prepare(backend)
    resolved = resolved_config(config, preset, option_tables(settings, data, steps=steps))

    from mhmoe_np.costs.plan import make_plan
    from mhmoe_np.training.preparation import text_size

    matmul = resolved.training.matmul
    load = partial(load_operations, backend, threads=threads, keep_buffers=True, matmul=matmul)
    with progress() as show_progress:
        show_progress("measuring the text", 0, 0)
        text_bytes = text_size(resolved)
        plan = make_plan(resolved, text_bytes, load=load, on_progress=show_progress)
    if as_json:
        print_json(_as_dict(plan))
    else:
        _print(plan)


def _as_dict(plan: Plan) -> dict[str, object]:
    return {
        **plan._asdict(),
        "parameters": plan.parameters._asdict(),
        "memory": {**plan.memory._asdict(), "peak": plan.memory.peak},
        "device": None if plan.device is None else plan.device._asdict(),
        "blas": None if plan.blas is None else plan.blas._asdict(),
    }


def _print(plan: Plan) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(), table.add_column(justify="right")
    table.add_row("parameters", f"{plan.parameters.total:,}")
    table.add_row("  met by one token", f"{plan.parameters.active:,}")
    table.add_row("FLOPs a token", f"{sum(plan.flops_per_token.values()):,}")
    for part, flops in plan.flops_per_token.items():
        if flops:
            table.add_row(f"  {part}", f"{flops:,}")
    table.add_row("memory at the peak", decimal(plan.memory.peak, precision=2))
    for part, size in plan.memory._asdict().items():
        if size:
            table.add_row(f"  {part}", decimal(size, precision=2))
    if plan.device is not None:
        table.add_row(f"  of {plan.device.name}", decimal(plan.device.total_bytes, precision=2))
        if plan.memory.peak > plan.device.total_bytes:
            table.add_row("", "it does not fit: a smaller batch, or more gradient_accumulation_steps")
    if plan.blas is not None:
        table.add_row("products by", " ".join(filter(None, plan.blas)))
    table.add_row("tokens/s", f"{plan.tokens_per_s:,.0f}")
    table.add_row("a step", f"{plan.step_seconds:.3g} s")
    table.add_row("all steps", duration(plan.training_seconds))
    table.add_row("disk", decimal(plan.disk, precision=2))
    show(console(least_width=80), table)
