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

    configs = {name: parse_run_config(tables, source=name) for name, tables in RUN_PRESETS.items()}
    counts = {name: parameter_count(config.model) for name, config in configs.items()}
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "parameters": counts[name].total,
                    "active_parameters": counts[name].active,
                    "steps": config.training.steps,
                    "description": described(config.model),
                }
                for name, config in configs.items()
            ]
        )
        return

    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("preset", no_wrap=True)
    for title in ("total", "active", "heads", "experts", "K"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, config in configs.items():
        model = config.model
        table.add_row(
            name,
            *(f"{count / 1e6:.1f}" for count in (counts[name].total, counts[name].active)),
            *(
                str(number) if model.num_experts else "-"
                for number in (model.moe_heads, model.num_experts, model.num_experts_per_tok)
            ),
        )
    screen = console(least_width=60)
    click.echo(
        click.wrap_text(
            "Millions of parameters, in total and active, which one token meets; the heads of an "
            "MH-MoE (an MoE has one), its experts, and to how many of them (K) each sub-token goes.",
            width=min(80, screen.width),
        )
    )
    click.echo()
    show(screen, table)
