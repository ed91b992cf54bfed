"""Makes benchmarks/README.md of what the benchmarks left in benchmarks/results.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from benchmarks.decode import KIND
from benchmarks.growth import GROWTH
from benchmarks.machines import RESULTS, described
from benchmarks.parts import PARTS
from benchmarks.plan import FORECASTS
from benchmarks.products import FILE as PRODUCTS
from benchmarks.sizes import benchmark_config
from mhmoe_np.operations.blas import BlasName

Point = dict[str, Any]
Points = list[Point]
PAGE = RESULTS.parent / "README.md"

HEAD = """# Benchmarks

This page is made by `python -m benchmarks.readme` of what the benchmarks wrote into `results/`, a folder for
each machine; nothing in it is typed by hand. `--blas own|openblas|mkl` chooses the library of our products, and
results say which it was. Install the peers with `pip install torch==2.13.0 && pip install -e '.[test]'`.

    python -m benchmarks.train [--size A|B] [--model dense|smoe|mhmoe|mhmoe-bitnet|mixtral]
                               [--peer torch|torch-compile|hf-mixtral] [--threads N]
                               [--blas own|openblas|mkl] [--json]
    python -m benchmarks.evaluate      the same, forward and loss alone
    python -m benchmarks.growth        how cost grows
    python -m benchmarks.products      single matrix products: ours, OpenBLAS's, MKL's
    python -m benchmarks.plan          whether `mhmoe-np plan` is right
    python -m benchmarks.packed        packed 1-bit products beside float32 (results/README.md)
    python -m benchmarks.bitnet        what ternary weights cost in perplexity (results/README.md)
    python -m benchmarks.questions     what the settings that users ask about do to perplexity (docs/questions.md)
    python -m benchmarks.decode        generated tokens beside transformers, llama.cpp and memory's speed
    python -m benchmarks.checkpoint    what checksums cost when a checkpoint is written
    python -m benchmarks.gpu           the cuda backend beside PyTorch and its floors, on a GPU
    python -m benchmarks.floors        what each operation of a step must cost on a GPU
    python -m benchmarks.kernel_costs  what the cuda backend's kernels do, beside that
"""

COMPARISON = """
## Beside PyTorch and Hugging Face

Both sides have the same weights, batches and optimiser and are processes of their own. They take turns; a
turn during which other processes took more than 5 % of the machine is dropped. Speeds are those of each
side's fastest turn, `ratio` is ours over theirs, `median` that of the turns' own ratios. PyTorch frees no
memory (glibc's `MALLOC_*` settings), and neither side is told which kernels to use. `MFU` counts the
multiply-adds of the matrices, causal attention by half, training three times, against the best float32
product of either side in the same run. `memory` is our process's peak over theirs. `mixtral` is `smoe`
with two experts of half the width, as Mixtral's gate over a single one would be 1.

Size A: width 256, 4 layers, 4 heads, 8 sequences of 256, vocabulary 8,192. Size B: width 768, 2 layers, 12
heads, 4 sequences of 512, vocabulary 8,192. All layers are MoE: 8 experts of 512 (B: 2,048), one chosen; MH-MoE
has 2 heads and 16 experts of 176 (B: 40 of 768), two chosen.
"""


def comparisons() -> Iterator[str]:
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*/*-threads.json"))]
    yield COMPARISON
    if not any("intel" in row["machine"].lower() for row in rows):
        yield "There are no results of an Intel processor.\n"
    for name in sorted({row["machine"] for row in rows}):
        yield f"**{name}**\n"
        yield "| | size | model | peer | threads | BLAS | tokens/s | peer's | ratio | median | MFU | peer's | memory |"
        yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
        for row in sorted(rows, key=lambda row: (row["work"] != "train", row["size"], row["model"])):
            if row["machine"] == name:
                keys = ("work", "size", "model", "peer", "threads")
                figures = ("ratio", "median_ratio", "mfu", "peer_mfu", "rss_ratio")
                cells = [
                    *(row[key] for key in keys),
                    row["blas"]["name"],
                    f"{row['ours_tokens_per_s']:,}",
                    f"{row['peer_tokens_per_s']:,}",
                    *(f"{row[key]:.2f}" for key in figures),
                ]
                yield f"| {' | '.join(map(str, cells))} |"
        yield "\nOur step by part, in milliseconds:\n"
        yield f"| | size | model | BLAS | {' | '.join(PARTS)} |"
        yield "|---" * (4 + len(PARTS)) + "|"
        seen = set()
        for row in sorted(rows, key=lambda row: (row["work"] != "train", row["size"], row["model"])):
            case = row["work"], row["size"], row["model"], row["blas"]["name"]
            if row["machine"] == name and case not in seen:
                seen.add(case)
                yield f"| {' | '.join(map(str, (*case, *(row['parts_ms'][part] for part in PARTS))))} |"
        yield ""


def per_thousand(point: Point, *parts: str) -> float:
    """Milliseconds of these parts for a thousand tokens; of all parts without any named."""
    spent: float = sum(point["parts_ms"][part] for part in parts or PARTS)
    return 1e3 * spent / point["tokens"]


def change(points: Points, *parts: str) -> str:
    first, last = per_thousand(points[0], *parts), per_thousand(points[-1], *parts)
    return f"{first:.3g} to {last:.3g} ms"


def at(points: Points, value: int) -> Point:
    return next(point for point in points if point["value"] == value)


def about_sequence(points: Points) -> str:
    rest = [part for part in PARTS if part != "attention"]
    first, last = points[0]["step_mb"], points[-1]["step_mb"]
    longest = points[-1]
    # Forward two products, backward five, each of D multiply-adds for a token and a key seen.
    size = benchmark_config("A", "mhmoe")
    width = size.num_hidden_layers * size.hidden_size
    operations = 7 * width * longest["value"] * longest["tokens"]
    speed = operations / longest["parts_ms"]["attention"] / 1e6
    return (
        f"Attention alone grows, from {change(points, 'attention')} for a thousand tokens: a token reads "
        f"half as many keys as the sequence is long, so beyond its projections the time is proportional "
        f"to T. All else stays ({change(points, *rest)}). With the tokens of a step fixed the step's memory "
        f"goes from {first:,.0f} to {last:,.0f} MB: attention keeps its output and one number a row, and a "
        f"block's scores live for that block alone, so memory is linear in T. Bound: the products of 64 query "
        f"rows with all keys before them; at {longest['value']:,} they and the exponentials run at "
        f"{speed:.0f} GFLOP/s, the projections counted as time alone."
    )


def about_experts(points: Points) -> str:
    few, many = at(points, 8), at(points, 256)
    moe = ("router", "dispatch", "experts")
    growth = per_thousand(many, "experts") / per_thousand(few, "experts")
    whole = per_thousand(many, *moe) / per_thousand(few, *moe)
    rows = 4 * points[0]["tokens"]
    return (
        f"The active work is fixed. From 8 to 256 experts the experts' time grows {growth:.2f} times, with "
        f"router and dispatch {whole:.2f} times; at {points[-1]['value']} it is "
        f"{per_thousand(points[-1], 'experts') / per_thousand(few, 'experts'):.2f} times. Bound: an expert "
        f"has {rows // 8:,} rows at 8 experts, {rows // 256} at 256 and {rows // 1024} at 1,024, and each "
        f"of its matrices is read and packed, and its gradient written, for ever less work. The router's "
        f"own product is proportional to E ({change(points, 'router')} for a thousand tokens), as are the "
        f"parameters, which AdamW passes over whatever was chosen ({change(points, 'optimiser')})."
    )


def about_vocabulary(points: Points) -> str:
    return (
        f"Output head and loss go from {change(points, 'head + loss')} for a thousand tokens, in proportion "
        f"to V: three products of N x V x D, which bound them, and a pass of exponentials. The logits are "
        f"held for a chunk of rows at a time, 32 MiB or 256 rows, so the step's memory goes from "
        f"{points[0]['step_mb']:,.0f} to {points[-1]['step_mb']:,.0f} MB where all logits at once would be "
        f"{points[-1]['tokens'] * points[-1]['value'] * 4 / 1e6:,.0f} MB. AdamW passes over the two matrices "
        f"of the vocabulary ({change(points, 'optimiser')})."
    )


def about_layers(points: Points) -> str:
    layers = points[-1]["value"] - points[0]["value"]
    spent = (per_thousand(points[-1]) - per_thousand(points[0])) / layers
    outside = per_thousand(points[0]) - spent
    return (
        f"A straight line: {spent:.3g} ms a layer for a thousand tokens, and {outside:.3g} ms outside the "
        f"layers, for the most part head and loss. Memory grows by "
        f"{(points[-1]['step_mb'] - points[0]['step_mb']) / layers:.3g} MB a layer, which the backward needs, "
        f"beside the layer's parameters, gradient and moments. Bound: the products, see the parts above."
    )


def about_threads(points: Points) -> str:
    if len(points) == 1:
        return "This machine has one core."
    first, last = per_thousand(points[0]), per_thousand(points[-1])
    worst = max(
        (part for part in PARTS if per_thousand(points[0], part) > 0.01 * first),
        key=lambda part: per_thousand(points[-1], part) / per_thousand(points[0], part),
    )
    return (
        f"{points[-1]['value']} threads are {first / last:.2f} times as fast as one. The products scale "
        f"nearly fully, as tasks are drawn from a common counter; of the parts above one percent "
        f"{worst} gains least ({change(points, worst)}). Bound: memory in the optimiser and the "
        f"activations, and what Python does between operations (in `rest`)."
    )


ABOUT: dict[str, Callable[[Points], str]] = {
    "sequence": about_sequence,
    "experts": about_experts,
    "vocabulary": about_vocabulary,
    "layers": about_layers,
    "threads": about_threads,
}


def results_of(name: str) -> Iterator[tuple[Path, Any]]:
    """What one benchmark left, of every machine and BLAS, with the place."""
    for path in sorted(RESULTS.glob(f"*/{name}.json")) + sorted(RESULTS.glob(f"*/{name}-*.json")):
        yield path, json.loads(path.read_text("utf-8"))


def products() -> Iterator[str]:
    yield "\n## Matrix products\n"
    yield "One thread, float32, GFLOP/s of each library, `own` being ours; `packed` is MKL's with the second matrix packed once,"
    yield "outside the time that is given, and `packing` the microseconds that this takes. N rows of I numbers"
    yield "make N of O; `nt`, `nn` and `tn` say which factor is transposed.\n"
    for _, found in results_of(PRODUCTS):
        yield f"**{found['machine']}**: {', '.join(found['libraries'].values())}\n"
        yield "| product | | N | O | I | own | OpenBLAS | MKL | own / the better of both | packed | packing |"
        yield "|---|---|---|---|---|---|---|---|---|---|---|"
        for row in found["rows"]:
            cells = [*(row[key] for key in ("name", "form", "rows", "outputs", "inputs"))]
            cells += [row.get(name, "") for name in get_args(BlasName)]
            others = [row[name] for name in get_args(BlasName) if name in row and name != "own"]
            cells.append(f"{row['own'] / max(others):.2f}" if "own" in row else "")
            cells += [row.get(name, "") for name in ("mkl_packed", "packing_us")]
            yield f"| {' | '.join(map(str, cells))} |"
        gains = [row["mkl_packed"] / row["mkl"] - 1 for row in found["rows"] if "mkl" in row]
        if gains:
            yield f"\nPacking changes MKL's speed by {min(gains):+.0%} to {max(gains):+.0%}, what packing takes not counted;"
            yield "our kernels do not use it."
        yield ""


DECODING = """
## Generation

One process each, in turn, as above; both make the likeliest token next, after 16 tokens. `transformers`: its
`generate`, the same float32 weights. `llama.cpp`: its F32; `llama.cpp-8-bit`: its Q8_0 beside `pack --format
int8` and `--head-dtype int8`. `own-float32`: a ternary model packed to 2 bits with the exact head, whose tokens
must be those of its float32 head, beside our own float32 decoding of a model of this size. `share` is the time in
which the same threads read as many bytes as a step needs (weights once, keys and values), over the step's.
"""


def decoding() -> Iterator[str]:
    found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"*/{KIND}*.json"))]
    yield DECODING
    for name in sorted({each["machine"] for each in found}):
        yield f"**{name}**\n"
        yield "| model | weights | beside | threads | BLAS | work | tokens/s | theirs | ratio | ms a step | MB | GB/s | share |"
        yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
        for each in found:
            for row in each["rows"] if each["machine"] == name else ():
                cells = [
                    *(each[key] for key in ("model", "weights", "peer", "threads")),
                    each["blas"]["name"],
                    f"prompt of {row['tokens']}"
                    if row["work"] == "prefill"
                    else f"{row['sequences']} texts",
                    *(f"{row[key]:,}" for key in ("ours_tokens_per_s", "peer_tokens_per_s")),
                    f"{row['ratio']:.2f}",
                    row.get("ours_ms", ""),
                    row.get("mb_a_step", ""),
                    each["gb_per_s"],
                    f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else "",
                ]
                yield f"| {' | '.join(map(str, cells))} |"
        yield ""


def growth() -> Iterator[str]:
    yield "\n## How cost grows\n"
    yield "Training size A's MH-MoE, one size changed at a time. `model` is parameters, gradient and"
    yield "moments; `step` what a step needs beside them; the program itself is not counted.\n"
    for path, curves in results_of(GROWTH):
        yield from growth_of(path, curves)


def growth_of(path: Path, curves: Any) -> Iterator[str]:
    suffix = path.stem.removeprefix(GROWTH)
    for name, curve in curves.items():
        points = [{**point, "tokens": curve["tokens"]} for point in curve["points"]]
        if name == "experts":
            assert points[0]["tokens"] == 8192  # the paragraph counts rows for H = K = 2
        yield f"### {curve['key']}\n"
        yield f"{curve['tokens']:,} tokens a step; {curve['machine']}, {described(curve['blas'])}.\n"
        yield f"![{name}](results/{path.parent.name}/growth-{name}{suffix}.png)\n"
        yield f"| {curve['key']} | tokens/s | model MB | step MB | {' | '.join(PARTS)} |"
        yield "|---" * (4 + len(PARTS)) + "|"
        for point in points:
            cells = [
                point["value"],
                f"{point['tokens_per_s']:,}",
                *(f"{point[key]:,.0f}" for key in ("model_mb", "step_mb")),
                *(f"{point['parts_ms'][part]:.1f}" for part in PARTS),
            ]
            yield f"| {' | '.join(map(str, cells))} |"
        yield f"\n{ABOUT[name](points)}\n"


def forecasts() -> Iterator[str]:
    yield "\n## `mhmoe-np plan`\n"
    yield "Forecast and what the run then took. Memory is the whole process's peak.\n"
    for _, found in results_of(FORECASTS):
        yield f"**{found['machine']}, {described(found['blas'])}**\n"
        yield "| model | planned MB | MB | error | planned s a step | s a step | error |"
        yield "|---|---|---|---|---|---|---|"
        for row in found["rows"]:
            yield (
                f"| {row['model']} | {row['planned_peak_mb']:,} | {row['peak_mb']:,} | {row['memory_error']:+.1%} "
                f"| {row['planned_step_s']} | {row['step_s']} | {row['time_error']:+.1%} |"
            )
        yield ""


def page() -> str:
    """The whole page."""
    lines = [HEAD, *comparisons(), *products(), *decoding(), *growth(), *forecasts()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
