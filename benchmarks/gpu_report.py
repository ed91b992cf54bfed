"""What `benchmarks.gpu` writes: the rows as JSON, and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_job import Row

Report = dict[str, Any]
# How far the first loss of two sides may lie apart, relative: float32's rounding, tf32's 10 bits, and
# activations at a tie that quantise apart.
TOLERANCES = {"float32": 2e-5, "tf32x3": 2e-5, "tf32": 2e-3}
BITNET_TOLERANCE = 2e-4
PEERS = ("torch", "torch-compile")


def write(report: Report, folder: Path) -> list[Path]:
    """The JSON, the page, and the plot where there is something to plot and matplotlib; their paths."""
    facts = report["facts"]
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    stem = f"gpu-{device}-{facts['date']}"
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    operations = [row for row in report["rows"] if "intensity" in row]
    plot = folder / f"{stem}.png"
    if operations and _drawn(operations, plot, facts["device"]):
        paths.append(plot)
    paths[1].write_text(page(report, plot.name if plot in paths else None), "utf-8")
    return paths


def _drawn(operations: list[Row], path: Path, device: str) -> bool:
    try:
        from benchmarks.roofline import draw
    except ModuleNotFoundError:  # matplotlib
        return False
    draw(operations, path, device)
    return True


def page(report: Report, plot: str | None) -> str:
    """The report as Markdown."""
    facts, rows = report["facts"], report["rows"]
    text = [f"# The cuda backend on {facts['device']}, {facts['date']}", ""]
    text += [", ".join(f"{key} {value}" for key, value in facts.items() if key != "date") + ".", ""]
    failed = {name: s["error"] for name, s in report["sections"].items() if s["error"]}
    text += [f"- {name}: {error}" for name, error in failed.items()] + [""] * bool(failed)
    whole = [row for row in rows if "work" in row]
    if whole:
        text += ["## Whole models", "", *_whole_models(whole), ""]
        text += [*(f"- {line}" for line in disagreements(whole)), ""]
    operations = [row for row in rows if "operation" in row]
    for size in dict.fromkeys(row["size"] for row in operations):
        text += [f"## Operations of a step at {size}", ""]
        text += [*_operations([row for row in operations if row["size"] == size]), ""]
    if plot:
        text += [f"![roofline]({plot})", ""]
    products = [row for row in rows if "outputs" in row]
    if products:
        text += ["## Products", "", *_products(products), ""]
    return "\n".join(text).rstrip() + "\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(map(_cell, line))} |" for line in lines),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _whole_models(rows: list[Row]) -> list[str]:
    """Tokens a second of every side; ratio: ours over the peer's better one in the same precision."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["work"], row["size"], row["model"], row["matmul"])
        found.setdefault(key, {})[row["side"]] = row
    lines = []
    for key, sides in sorted(found.items()):
        speeds = {side: row["tokens_per_s"] for side, row in sides.items()}
        # tf32x3 is float32 in another way.
        plain = found.get((*key[:3], "float32"), {}) if key[3] == "tf32x3" else sides
        peers = [plain[peer]["tokens_per_s"] for peer in PEERS if peer in plain]
        ours = sides.get("ours", {})
        ratio = speeds["ours"] / max(peers) if peers and ours else None
        rest = ratio, ours.get("times_floor"), ours.get("device_mb")
        lines.append([*key, speeds.get("ours"), *(speeds.get(peer) for peer in PEERS), *rest])
    head = ("work", "size", "model", "products", "ours", *PEERS, "ratio", "times the floor", "MB")
    return _table(head, lines)


def disagreements(rows: list[Row]) -> list[str]:
    """Where the first loss of ours and of a peer differ by more than rounding explains."""
    losses = {
        (row["size"], row["model"], row["matmul"], row["side"]): row["nll"]
        for row in rows
        if "nll" in row
    }
    found = []
    for (size, model, matmul, side), nll in losses.items():
        if side == "ours":
            continue
        ours = losses.get((size, model, matmul, "ours"))
        allowed = max(TOLERANCES[matmul], BITNET_TOLERANCE * model.endswith("-bitnet"))
        if ours is not None and not abs(ours - nll) <= allowed * abs(nll):
            found.append(f"the losses differ at {size}, {model}, {matmul}: ours {ours}, {side} {nll}")
    return found


def _operations(rows: list[Row]) -> list[str]:
    head = ("call", "x", "µs", "floor µs", "times", "bound", "GB/s", "TFLOP/s")
    keys = ("calls", "us", "floor_us", "times_floor", "bound", "gb_per_s", "tflop_per_s")
    return _table(
        head,
        ([row.get("call", row["operation"]), *(row.get(key) for key in keys)] for row in rows),
    )


def _products(rows: list[Row]) -> list[str]:
    """Microseconds of every kind, side by side."""
    kinds = list(dict.fromkeys((row["side"], row["kind"]) for row in rows))
    found: dict[tuple[int, int, int], dict[tuple[str, str], Any]] = {}
    for row in rows:
        key = (row["outputs"], row["inputs"], row["rows"])
        found.setdefault(key, {})[row["side"], row["kind"]] = row.get("us", row.get("error"))
    head = ("outputs", "inputs", "rows", *(f"{side} {kind} µs" for side, kind in kinds))
    return _table(head, ([*key, *(f.get(kind) for kind in kinds)] for key, f in sorted(found.items())))
