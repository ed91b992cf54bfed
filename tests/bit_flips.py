"""Flip single bits of a run folder and of packed models, and see that each is found.

    python -m tests.bit_flips [--flips 1000] [--seed 0]

A flip in a run folder must be refused or told of when the run is resumed, one in a packed model when it
is loaded for evaluation. Every file has the same share of the flips, and every tenth goes to the first
bytes of its file, where headers are. Exits with 1 if one is not found.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mhmoe_np.checkpoints.checkpoint import load_checkpoint_tokenizer, load_model
from mhmoe_np.errors import UserError
from mhmoe_np.operations.load import load_operations
from mhmoe_np.training.run import resume_run
from mhmoe_np.training.run_folder import REPORT
from tests.resume import command, prepare

OPS = load_operations("numpy")
HEADER = 64  # bytes


def make(folder: Path) -> list[tuple[str, Path]]:
    """Two runs, one of BitNet, and packed models of it; before each, how it is read."""
    prepare(folder, steps=9)
    quantised = ["--set", "quantization=bitnet_b158", "--set", "schedule=two-stage"]
    for name, options in (("run", []), ("quantised", quantised)):
        arguments = [*command(folder, name), "--backend", "numpy", *options]
        subprocess.run(arguments, check=True, capture_output=True)
    main = command(folder, "x")[:3]
    packed = []
    for format in ("ternary-2bit", "ternary-base3"):
        out = folder / format
        options = ["pack", str(folder / "quantised"), "--out", str(out), "--format", format]
        subprocess.run([*main, *options], check=True, capture_output=True)
        packed.append(("packed", out))
    return [("run", folder / "run"), ("run", folder / "quantised"), *packed]


def resume(run: Path) -> str:
    """What a resumed run's owner is told."""
    trainer = resume_run(run, {"training": {"steps": 12}}, backend="numpy")
    trainer.close()
    return "; ".join(trainer.notices)


def evaluate(checkpoint: Path) -> str:
    """Nothing, where a packed model loads."""
    load_checkpoint_tokenizer(checkpoint)
    load_model(checkpoint, np.float32, ops=OPS)
    return ""


READERS: dict[str, Callable[[Path], str]] = {"run": resume, "packed": evaluate}


def found(kind: str, original: Path, file: Path, place: int, mask: int) -> str:
    """What is said of a copy in which one byte's bits of `mask` are flipped; nothing: all is well."""
    copy = original.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    path = copy / file
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)
    try:
        return READERS[kind](copy)
    except UserError as error:
        return str(error)


def flips(folders: list[tuple[str, Path]], count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many flips were found in files of each name, and which were not."""
    rng = random.Random(seed)
    files = [
        (kind, folder, path.relative_to(folder))
        for kind, folder in folders
        for path in sorted(folder.rglob("*"))
        # Nothing reads the report: it is made anew of what is read.
        if path.is_file() and path.stat().st_size and path.name != REPORT
    ]
    for kind, folder, file in files:
        said = found(kind, folder, file, 0, 0)
        assert not said, f"without a flip: {said}"
    seen: Counter[str] = Counter()
    missed = []
    for number in range(count):
        kind, folder, file = files[number % len(files)]
        size = (folder / file).stat().st_size
        place = rng.randrange(min(size, HEADER) if rng.random() < 0.1 else size)
        bit = rng.randrange(8)
        if found(kind, folder, file, place, 1 << bit):
            seen[file.name] += 1
        else:
            missed.append(f"{folder.name}/{file}: byte {place}, bit {bit}")
    return seen, missed


def main() -> None:
    """Flip, and print by file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seen, missed = flips(make(Path(name)), arguments.flips, arguments.seed)
    for file, number in sorted(seen.items()):
        print(f"{number:5d}  {file}")
    for line in missed:
        print(f"NOT FOUND: {line}")
    print(f"{sum(seen.values())} of {arguments.flips} flips found")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
