"""What ternary weights cost in perplexity: the paper's five models, float32 and BitNet, side by side.

    python -m benchmarks.bitnet [--steps 450] [--threads N] [--out runs/bitnet]
                                [--blas own|openblas|mkl] [--json]

Trains each `small-...` preset and its `-bitnet` sibling on the embedded corpus for the same number of
steps, each with its own recipe, scores the held-out text, packs every ternary model and checks what is
packed. Finished and interrupted runs in the folder are taken up where they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machines import add_blas_option, use_blas
from mhmoe_np.settings.presets import PAPER_MODELS

COMMAND = [sys.executable, "-c", "from mhmoe_cli.main import main; main()"]


def mhmoe(*arguments: object) -> str:
    """Run a command of ours; what it says goes to standard error, what it prints is returned."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return result.stdout


def score(preset: str, folder: Path, steps: int, threads: int | None) -> dict[str, Any]:
    """Train, unless it is done, and return the held-out scores by domain."""
    options: list[object] = ["--preset", preset, "--steps", steps, "--out", folder / preset]
    if threads:
        options += ["--threads", threads]
    mhmoe("train", *options, "--resume", "auto")
    scores: dict[str, Any] = json.loads((folder / preset / "evaluation.json").read_text())["domains"]
    return scores


def packed_values(preset: str, folder: Path) -> dict[str, float]:
    """Pack the trained model; shares of -1, 0 and +1 over all its quantised matrices.

    Raises SystemExit: a quantised matrix has another value.
    """
    packed = folder / f"{preset}-packed"
    if not packed.exists():
        mhmoe("pack", folder / preset, "--out", packed)
    rows = [row for row in json.loads(mhmoe("inspect", packed, "--json")) if row["scale"] is not None]
    sizes = [row["shape"][0] * row["shape"][1] for row in rows]
    shares = {
        name: sum(row[name] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
        for name in ("minus", "zero", "plus")
    }
    for row in rows:
        if abs(row["minus"] + row["zero"] + row["plus"] - 1) > 1e-12:
            raise SystemExit(f"{preset}: {row['name']} is not ternary")
    return {**shares, "matrices": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/bitnet"))
    parser.add_argument("--json", action="store_true")
    add_blas_option(parser)
    arguments = parser.parse_args()
    use_blas(arguments.blas)
    rows = []
    for model in PAPER_MODELS:
        scores = {
            weights: score(f"small-{model}{suffix}", arguments.out, arguments.steps, arguments.threads)
            for weights, suffix in (("float32", ""), ("ternary", "-bitnet"))
        }
        perplexity = {
            weights: {domain: round(values["token_ppl"], 2) for domain, values in domains.items()}
            for weights, domains in scores.items()
        }
        packed = packed_values(f"small-{model}-bitnet", arguments.out)
        started = json.loads((arguments.out / f"small-{model}" / "environment.json").read_text())
        row = {"model": model, "steps": arguments.steps, "token_ppl": perplexity, **packed}
        rows.append({**row, "blas": started["blas"]})
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"token perplexity after {arguments.steps} steps, float32 / ternary; shares once packed")
    domains = list(rows[0]["token_ppl"]["float32"])
    print(f"{'model':20s}" + "".join(f"{domain:>20s}" for domain in domains) + "       -1/0/+1")
    for row in rows:
        pairs = (
            f"{row['token_ppl']['float32'][domain]:.1f} / {row['token_ppl']['ternary'][domain]:.1f}"
            for domain in domains
        )
        shares = " ".join(f"{row[name]:.3f}" for name in ("minus", "zero", "plus"))
        print(f"{row['model']:20s}" + "".join(f"{pair:>20s}" for pair in pairs) + f"  {shares}")


if __name__ == "__main__":
    main()
