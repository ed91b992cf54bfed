"""`mhmoe-np parity`."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import click

from mhmoe_cli.printing import print_json
from mhmoe_np.costs.parity import Comparison, Solution, paper_rows, solve
from mhmoe_np.errors import UserError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--heads", type=int, help="Solve for a layer with this many heads ...")
@click.option("--top-k", type=int, help="... and this many experts for each sub-token.")
@click.option("--hidden-size", type=int, default=768, show_default=True)
@click.option("--baseline-experts", type=int, default=8, show_default=True)
@click.option("--baseline-top-k", type=int, default=1, show_default=True)
@click.option("--baseline-intermediate-size", type=int, default=2048, show_default=True)
@click.option(
    "--ffn",
    type=click.Choice(["swiglu", "relu"]),
    default="swiglu",
    show_default=True,
    help="Experts of three matrices, or of two as the paper prints.",
)
def command(
    as_json: bool,
    heads: int | None,
    top_k: int | None,
    hidden_size: int,
    baseline_experts: int,
    baseline_top_k: int,
    baseline_intermediate_size: int,
    ffn: Literal["swiglu", "relu"],
) -> None:
    """Show the paper's models at equal cost; with --heads and --top-k, solve for another one.

    Counts are of one MoE layer, router excluded; a multiply-add is two FLOPs.
    """
    if heads is None and top_k is None:
        _print_table(as_json)
        return
    if heads is None or top_k is None:
        raise UserError("--heads and --top-k: give both to solve, or neither for the table")
    solution = solve(
        hidden_size,
        baseline_experts,
        baseline_top_k,
        baseline_intermediate_size,
        heads,
        top_k,
        ffn,
    )
    _print_solution(solution, as_json)


def _print_table(as_json: bool) -> None:
    rows = paper_rows()
    if as_json:
        values = [
            {
                "name": row.name,
                "moe_layer_parameters": row.parameters,
                "macs_per_token": row.macs_per_token,
                "router_parameters": row.router_parameters,
                "router_macs": row.router_macs,
            }
            for row in rows
        ]
        print_json(values)
        return
    click.echo(
        f"{'model':18s} {'H':>3s} {'E':>3s} {'K':>2s} {'F':>5s} {'parameters':>12s} MACs a token"
    )
    for row in rows:
        click.echo(
            f"{row.name:18s} {row.heads:3d} {row.experts:3d} {row.top_k:2d} "
            f"{row.intermediate_size:5d} {row.parameters:12,d} {row.macs_per_token:12,d}"
        )


def _print_solution(solution: Solution, as_json: bool) -> None:
    if as_json:
        value = {
            "intermediate_size": solution.intermediate_size,
            "experts": solution.experts,
            "exact_intermediate_size": float(solution.exact_intermediate_size),
            "exact_experts": float(solution.exact_experts),
            "macs_per_token": _comparison(solution.macs),
            "moe_layer_parameters": _comparison(solution.parameters),
        }
        print_json(value)
        return
    inner, experts = solution.exact_intermediate_size, solution.exact_experts
    click.echo(f"inner width F  {solution.intermediate_size}  (exactly {_fraction(inner)})")
    click.echo(f"experts E      {solution.experts}  (exactly {_fraction(experts)} for that width)")
    for name, count in (("MACs a token", solution.macs), ("parameters", solution.parameters)):
        click.echo(
            f"{name:14s} {count.solution:,} against {count.baseline:,}: {count.difference:+,} "
            f"({count.percent:+.3f} %)"
        )


def _comparison(count: Comparison) -> dict[str, float]:
    return {
        "baseline": count.baseline,
        "solution": count.solution,
        "difference": count.difference,
        "percent": count.percent,
    }


def _fraction(x: Fraction) -> str:
    return str(x) if x.denominator == 1 else f"{x} = {float(x):.4f}"
