"""`mhmoe-np presets`."""

from __future__ import annotations

import click

from mhmoe_cli.printing import console, print_json, show


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """List the named settings that train and plan take as --preset.

    quick is the default; paper-... are the models of the paper's tables, small-... the same at a
    quarter of the width; ...-bitnet is trained with BitNet's recipe.
    """
    from mhmoe_np.costs.model import parameter_count
    from mhmoe_np.settings.presets import RUN_PRESETS, described
    from mhmoe_np.settings.run import parse_run_config

    rows = []
    for name, tables in RUN_PRESETS.items():
        config = parse_run_config(tables, source=name)
        count = parameter_count(config.model)
        rows.append(
            {
                "name": name,
                "parameters": count.total,
                "active_parameters": count.active,
                "steps": config.training.steps,
                "description": described(config.model),
            }
        )
    if as_json:
        print_json(rows)
        return

    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("preset", no_wrap=True)
    for title in ("total", "active"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("model")
    for row in rows:
        counts = (f"{row[key] / 1e6:.1f}" for key in ("parameters", "active_parameters"))
        table.add_row(row["name"], *counts, row["description"])
    click.echo("Millions of parameters: in total, and active, which one token meets.\n")
    show(console(least_width=80), table)
