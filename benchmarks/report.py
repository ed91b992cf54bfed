"""The command line of the comparisons, and what they print, write and draw."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.compare import PEERS, Work, compare
from benchmarks.machines import add_blas_option, described, folder_of, tag, use_blas, write_results
from benchmarks.parts import PARTS
from benchmarks.sizes import MODELS, SIZES
from mhmoe_np.operations.load import cores


def main(work: Work, description: str) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="A")
    parser.add_argument("--model", choices=MODELS, help="default: mhmoe, beside hf-mixtral: mixtral")
    parser.add_argument("--peer", choices=PEERS, default="torch")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--batches", type=int, default=8, help="different ones, seen before the timing")
    parser.add_argument("--repeats", type=int, default=7, help="undisturbed turns of each side")
    parser.add_argument(
        "--disturbed", type=float, default=0.05, help="share of others that spoils a turn"
    )
    parser.add_argument(
        "--results", type=Path, help="where row and plot are written; default: the machine's folder"
    )
    add_blas_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    model = options.model or ("mixtral" if options.peer == "hf-mixtral" else "mhmoe")
    if (options.peer == "hf-mixtral") != (model == "mixtral"):
        parser.error("--peer hf-mixtral goes with --model mixtral, and only with it")
    use_blas(options.blas)
    row = compare(
        options.size,
        model,
        options.peer,
        work,
        threads=options.threads,
        batches=options.batches,
        repeats=options.repeats,
        disturbed=options.disturbed,
    )
    folder = options.results or folder_of(row["machine"])
    keys = ("work", "size", "model", "peer")
    name = "-".join(row[key] for key in keys) + f"{tag(row['blas'])}-{row['threads']}-threads"
    write_results(folder, name, row)
    draw(row, folder / f"{name}.png")
    if options.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:20s} {value}")


def draw(row: dict[str, Any], path: Path) -> None:
    """Speeds side by side, and our step by part, with the machine named."""
    figure, (speed, parts) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 1.6))
    names, values = ("mhmoe-np", row["peer"]), (row["ours_tokens_per_s"], row["peer_tokens_per_s"])
    speed.bar(names, values, color=("tab:blue", "tab:gray"))
    speed.set_ylabel(f"{row['work']}: tokens/s")
    speed.set_title(f"{row['ratio']} times as fast", fontsize=10)
    milliseconds = [row["parts_ms"][part] for part in PARTS]
    parts.barh(PARTS[::-1], milliseconds[::-1], color="tab:blue")
    parts.set_xlabel("milliseconds of our step")
    figure.suptitle(
        f"size {row['size']}, {row['model']}, {row['threads']} threads; {row['machine']}, "
        f"{described(row['blas'])}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_curve(name: str, curve: dict[str, Any], path: Path) -> None:
    """Tokens/s, and milliseconds of each part for a thousand tokens, against the size that grows."""
    points = curve["points"]
    values = [point["value"] for point in points]
    figure, (speed, parts) = plt.subplots(1, 2, figsize=(9, 3.2))
    speed.plot(values, [point["tokens_per_s"] for point in points], "o-", color="tab:blue")
    speed.set_ylabel("tokens/s"), speed.set_ylim(bottom=0)
    memory = speed.twinx()
    memory.plot(values, [p["step_mb"] for p in points], "s--", color="tab:red", label="step")
    memory.plot(values, [p["model_mb"] for p in points], "^:", color="tab:brown", label="model")
    memory.set_ylabel("MB"), memory.set_ylim(bottom=0), memory.legend(fontsize=7)
    milliseconds = [
        [1e3 * point["parts_ms"][part] / curve["tokens"] for point in points] for part in PARTS
    ]
    parts.stackplot(values, milliseconds, labels=PARTS)
    parts.set_ylabel("ms for 1000 tokens"), parts.legend(fontsize=6, loc="upper left")
    for axes in (speed, parts):
        axes.set_xlabel(curve["key"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values], fontsize=7, rotation=30)
    where = f"{curve['machine']}, {described(curve['blas'])}"
    figure.suptitle(f"training against {name}; {where}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
