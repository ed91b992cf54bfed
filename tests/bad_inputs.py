"""Feed the command line bad inputs, drawn at random but reproducibly, and see that each ends well.

    python -m tests.bad_inputs [--count 1500] [--seed 0] [--jobs 2] [--only NUMBER]

It ends well if there is no traceback and no hang; with code 2 also if one line says why and nothing
was written; and if no file that was there has changed. The kernels are compiled once, before. Prints
every failure with what runs it again (--only), and a summary by category; exits with 1 on a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import tomli_w

from tests.bad_cases import CATEGORIES, MODEL, NUMPY, RUN, TEXT, Case

TIME_LIMIT = 60  # seconds
MEMORY_LIMIT = 12 << 30  # bytes of address space: what slips through must not take the machine down
SCRIPT = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))
from mhmoe_cli.main import main
main()
"""
PROGRAM = [sys.executable, "-c", SCRIPT]


class Ending(NamedTuple):
    """How a case ended."""

    number: int
    category: str
    case: Case
    code: int | None  # None: it was still running
    faults: list[str]
    output: str
    errors: str


def prepare(folder: Path) -> None:
    """What cases are made of: a random model, a trained checkpoint and its run, a packed one."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "config.toml").write_text(tomli_w.dumps(RUN))
    (folder / "bitnet.toml").write_text(
        tomli_w.dumps(RUN | {"model": MODEL | {"quantization": "bitnet_b158"}})
    )
    (folder / "text.txt").write_text(TEXT)
    for arguments in (
        ["init", "config.json", "--out", "model", "--seed", "0"],
        ["train", "bitnet.toml", "--data", "text.txt", "--out", "bitnet-run", *NUMPY],
        ["pack", "bitnet-run", "--out", "packed", *NUMPY],
        ["train", "config.toml", "--data", "text.txt", "--out", "run", *NUMPY],
        ["eval", "run", "--domain", "a=text.txt"],  # compiles
        ["generate", "run", "--prompt", "the"],
    ):
        subprocess.run([*PROGRAM, *arguments], cwd=folder, check=True, capture_output=True)
    for run, name in (("run", "checkpoint"), ("bitnet-run", "bitnet")):
        (folder / name).symlink_to(f"{run}/checkpoints/step-00000001")


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, and what stands there."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        content = str(stat.S_IFMT(mode))
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            size = path.lstat().st_size
            whole = b"" if size > 1 << 30 else path.read_bytes()
            content = f"{size} {hashlib.sha256(whole).hexdigest()}"
        found[str(path.relative_to(folder))] = content
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def faults_of(case: Case, code: int, output: str, errors: str, before: Any, after: Any) -> list[str]:
    """What is wrong with how a case ended."""
    faults = []
    if "Traceback" in errors or "panicked" in errors:
        faults.append("a traceback")
    if code not in case.codes:
        faults.append(f"code {code}, not {sorted(case.codes)}")
    lines = [line for line in errors.splitlines() if not line.startswith("compiling kernels")]
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("mhmoe-np: ")):
        faults.append(f"{len(lines)} lines on stderr")
    resumed = "--resume" in case.arguments and code != 2
    changed = [name for name, content in before.items() if after.get(name) != content]
    if changed and not resumed:
        faults.append(f"changed {changed}")
    left = sorted(name for name in after.keys() - before.keys() if code == 2 or ".tmp-" in name)
    if left:
        faults.append(f"left {left[:3]}")
    if code == 0 and "--json" in case.arguments:
        try:
            json.loads(output, parse_constant=_refuse_constant)
        except ValueError as error:
            faults.append(f"invalid JSON: {error}")
    return faults


def run_case(number: int, seed: int, material: Path) -> Ending:
    """Make case `number` of a seed in a folder of its own, and run it."""
    make = CATEGORIES[number % len(CATEGORIES)]
    with tempfile.TemporaryDirectory(prefix="bad-input-") as name:
        folder = Path(name)
        case = make(Random(f"{seed} {number}"), folder, material)
        before = snapshot(folder)
        try:
            done = subprocess.run(
                [*PROGRAM, *case.arguments],
                cwd=folder,
                env=os.environ | case.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Ending(
                number, make.__name__, case, None, [f"{TIME_LIMIT} s were not enough"], "", ""
            )
        output, errors = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        faults = faults_of(case, done.returncode, output, errors, before, snapshot(folder))
    return Ending(number, make.__name__, case, done.returncode, faults, output, errors)


def described(ending: Ending, seed: int) -> str:
    """A failure, and how to see it again."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in ending.case.environment.items()]
    command = " ".join([*variables, "mhmoe-np", *map(shlex.quote, ending.case.arguments)])
    return "\n".join(
        [
            f"--seed {seed} --only {ending.number} ({ending.category}): {'; '.join(ending.faults)}",
            f"  {ascii(command)[1:-1][:300]}",
            f"  {ending.errors[-300:]!a}",
        ]
    )


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="run this case alone and show all of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        material = Path(name)
        prepare(material)
        if options.only is not None:
            ending = run_case(options.only, options.seed, material)
            print(
                f"{described(ending, options.seed)}\ncode {ending.code}\n{ending.output}{ending.errors}"
            )
            sys.exit(bool(ending.faults))
        endings = pool.map(
            lambda number: run_case(number, options.seed, material), range(options.count)
        )
        codes: Counter[tuple[str, int | None]] = Counter()
        failures: Counter[str] = Counter()
        for ending in endings:
            codes[ending.category, ending.code] += 1
            if ending.faults:
                failures[ending.category] += 1
                print(described(ending, options.seed), flush=True)
    for make in CATEGORIES:
        category = make.__name__
        shares = ", ".join(
            f"{count} of code {code}" for (kind, code), count in codes.items() if kind == category
        )
        print(f"{category:14s} {failures[category]} failed; {shares}")
    print(f"{sum(codes.values())} cases, {sum(failures.values())} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
