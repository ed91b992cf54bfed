"""Check the results of an implementation of MH-MoE against the vectors in this folder.

    python check_vectors.py RESULTS                    every vector
    python check_vectors.py RESULTS --only 'route/*'   those whose names match; may be repeated
    python check_vectors.py --list                     what there is

RESULTS holds a file for each vector, RESULTS/<name of the vector>.safetensors or .npz, with a tensor
for each result and each gradient that index.json lists, under the same names. float32 and float64
tensors are held to the tolerance of their own type, integers must be equal.

Needs NumPy and safetensors alone. Ends with 0 if all pass, 1 if one fails or has no results, 2 if the
arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
CHECKED = "result", "gradient"
Tensors = dict[str, NDArray[Any]]


class Fault(Exception):
    """Why a vector fails."""


class Worst(NamedTuple):
    """The element of a tensor that is farthest off."""

    share: float  # of the tolerance
    tensor: str
    text: str


def read_results(folder: Path, name: str) -> Tensors:
    """The tensors of one vector's results."""
    for suffix, read in ((".safetensors", load_file), (".npz", _read_npz)):
        path = folder / f"{name}{suffix}"
        if path.exists():
            try:
                return read(path)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise Fault(f"{path}: cannot be read: {reason or type(error).__name__}") from None
    raise Fault(f"no results: {folder / name}.safetensors or .npz is missing")


def _read_npz(path: Path) -> Tensors:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def compare(name: str, spec: dict[str, Any], actual: NDArray[Any], expected: NDArray[Any]) -> Worst:
    """One tensor: how much of its tolerance it uses."""
    if list(actual.shape) != spec["shape"]:
        raise Fault(f"{name} has shape {list(actual.shape)}, must be {spec['shape']}")
    kind, tolerances = str(actual.dtype), spec.get("tolerance")
    if tolerances is None:
        if actual.dtype.kind not in "iu":
            raise Fault(f"{name} is {kind}; must hold integers")
        off, tolerance = (actual != expected).astype(float), 0.0
    else:
        if kind not in tolerances:
            raise Fault(f"{name} is {kind}; must be {' or '.join(tolerances)}")
        with np.errstate(invalid="ignore"):
            off = np.abs(actual.astype(np.float64) - expected)
        off, tolerance = np.where(np.isfinite(off), off, np.inf), tolerances[kind]
    if not off.size:
        return Worst(0.0, name, "")
    place = np.unravel_index(np.argmax(off), off.shape)
    worst = float(off[place])
    share = worst / tolerance if tolerance else (math.inf if worst else 0.0)
    index = f"[{', '.join(map(str, place))}]" if place else ""
    text = f"{name}{index} is {actual[place]}, must be {expected[place]}"
    text += " exactly" if not tolerance else f": off by {worst:.3g}, tolerance {tolerance:.3g}"
    return Worst(share, name, text)


def check(entry: dict[str, Any], actual: Tensors) -> Worst:
    """One vector: its worst tensor. Raises Fault if one is missing, misshapen or beyond tolerance."""
    expected: Tensors = load_file(HERE / entry["file"])
    specs = entry["tensors"]
    unknown = sorted(set(actual) - set(specs))
    if unknown:
        raise Fault(f"{unknown[0]} is no tensor of this vector: {', '.join(specs)}")
    needed = [name for name in specs if specs[name]["role"] in CHECKED]
    for name in needed:
        if name not in actual:
            raise Fault(f"{name} is missing")
    found = [compare(name, specs[name], actual[name], expected[name]) for name in needed]
    worst = max(found, key=lambda each: each.share)
    beyond = [each.tensor for each in found if each.share > 1]
    if beyond:
        others = "" if beyond[0] == worst.tensor else f"; first beyond its tolerance: {beyond[0]}"
        raise Fault(worst.text + others)
    return worst


def main() -> int:
    """Run the check; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS", help="a folder")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names, with * and ?")
    parser.add_argument("--list", action="store_true", help="list the vectors")
    options = parser.parse_args()
    vectors = json.loads((HERE / "index.json").read_text(encoding="utf-8"))["vectors"]
    patterns = options.only or ["*"]
    chosen = [name for name in vectors if any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"--only {patterns[0]}: matches no vector; --list shows them")
    if options.list:
        for name in chosen:
            print(f"{name:50} {vectors[name]['about']}")
        return 0
    if options.results is None or not options.results.is_dir():
        parser.error("RESULTS: give the folder that holds your results")

    failed = 0
    for name in chosen:
        try:
            worst = check(vectors[name], read_results(options.results, name))
            print(f"ok    {name:50} {worst.share:6.1%} of the tolerance, {worst.tensor}")
        except Fault as fault:
            failed += 1
            print(f"FAIL  {name:50} {fault}")
    print(f"{len(chosen) - failed} of {len(chosen)} vectors pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
