"""On what a benchmark ran: the machine, the BLAS of our side, and where results of both are kept."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from mhmoe_np.operations.blas import VARIABLE, BlasName
from mhmoe_np.operations.load import cores
from mhmoe_np.operations.processor import processor, processor_facts

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor, as its maker and its family name it."""
    facts = processor_facts()
    widest = "AVX-512" if "avx512f" in facts.get("flags", "") else "AVX2"
    family, kind = facts.get("cpu family", "?"), facts.get("model", "?")
    return f"{processor()} (family {family} model {kind}, {widest}, {cores()} cores)"


def folder_of(machine: str) -> Path:
    """Where results of a machine are kept, by what `machine` says but for the cores."""
    plain = re.sub(r"\(R\)|\(TM\)|, \d+ cores|\b(CPU|Processor|\d+-Core)\b|@ [\d.]+GHz", "", machine)
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", plain.replace("AVX-", "AVX").lower()).strip("-")


def write_results(folder: Path, name: str, found: object) -> None:
    """What a benchmark found, as `name`.json in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def add_blas_option(parser: argparse.ArgumentParser) -> None:
    """`--blas own|openblas|mkl`; `use_blas` takes its value."""
    parser.add_argument(
        "--blas",
        choices=get_args(BlasName),
        help="of our matrix products; else what the product chooses",
    )


def use_blas(name: str | None) -> None:
    """Let this process, before it loads the backend, and those that it starts multiply with a BLAS."""
    if name:
        os.environ[VARIABLE] = name


def tag(blas: Mapping[str, Any]) -> str:
    """What tells a file of results from that of the same with OpenBLAS."""
    return "" if blas["name"] == "openblas" else f"-{blas['name']}"


def described(blas: Mapping[str, Any]) -> str:
    """Name, version and architecture, as far as they are known."""
    return " ".join(filter(None, (blas["name"], blas["version"], blas["architecture"])))
