"""Operations held against other implementations: PyTorch with autograd, Hugging Face's modules.

No framework is imported here. A peer computes in a process of its own, which runs `peer/compute.py`;
where one is not installed, that is said and nothing is compared.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_np.audit.agreement import Agreement, agreement, labelled_arrays, named_arguments, results_of
from mhmoe_np.audit.calls import EPS, Call, calls
from mhmoe_np.operations.table import BitWeight, Operations, PackedWeight

SCRIPT = Path(__file__).parent / "peer" / "compute.py"
TIME_LIMIT = 300  # seconds


class Peer(NamedTuple):
    """Another implementation, and the float type in which it can be held to a bound."""

    name: str
    title: str
    modules: tuple[str, ...]
    dtype: str


# Hugging Face computes norms and softmax in float32, whatever it is given.
PEERS = (
    Peer("torch", "PyTorch", ("torch",), "float64"),
    Peer("hf", "Hugging Face", ("torch", "transformers"), "float32"),
)


class Answer(NamedTuple):
    """What came of asking one peer."""

    peer: Peer
    state: str  # its version, or why nothing was compared
    agreements: tuple[Agreement, ...]


def ask(peers: Sequence[Peer], *, definition: Operations) -> list[Answer]:
    """Have each peer compute what it can of all calls, and compare it with the definition."""
    installed = [peer for peer in peers if not _missing(peer)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = {peer: _requests(peer, folder / peer.name, definition) for peer in installed}
        reason = _run(folder, installed) if installed else ""
        return [
            Answer(peer, f"not compared: {_missing(peer)} is not installed", ())
            if _missing(peer)
            else _answer(peer, asked[peer], folder / peer.name, reason, definition)
            for peer in peers
        ]


def _missing(peer: Peer) -> str:
    """The first of a peer's modules that is not installed; empty: all are."""
    return next((name for name in peer.modules if importlib.util.find_spec(name) is None), "")


def _run(folder: Path, peers: Sequence[Peer]) -> str:
    """Have them compute, one after the other; why that ended early, if it did."""
    command = [sys.executable, "-P", str(SCRIPT), str(folder), *(peer.name for peer in peers)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return f"it took more than {TIME_LIMIT} s"
    return (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]


def _requests(peer: Peer, folder: Path, definition: Operations) -> list[Call]:
    """Write down what a peer is asked; peers have no quantised weights."""
    folder.mkdir()
    asked = [
        call
        for call in calls(peer.dtype, definition=definition)
        if not any(isinstance(value, BitWeight | PackedWeight) for value in call.arguments)
    ]
    requests = [_request(call, folder / f"{i}.npz") for i, call in enumerate(asked)]
    (folder / "calls.json").write_text(json.dumps(requests))
    return asked


def _answer(
    peer: Peer, asked: Sequence[Call], folder: Path, reason: str, definition: Operations
) -> Answer:
    """What a peer wrote; the last of it is its version."""
    version = folder / "version"
    if not version.exists():
        return Answer(peer, f"not compared: {reason}", ())
    agreements = []
    for i, call in enumerate(asked):
        answer = folder / f"{i}.out.npz"
        if answer.exists():
            with np.load(answer) as file:
                actual = dict(file)
            # What backends owe each other to the bit, another implementation may round differently.
            expected, call = results_of(call, definition), call._replace(exact=False)
            agreements.append(agreement(call, actual, expected, dtype=peer.dtype))
    return Answer(peer, version.read_text(), tuple(agreements))


def _request(call: Call, operands: Path) -> dict[str, Any]:
    """Write a call's arrays; return what else the peer must know, numbers inside a tuple by label."""
    arguments = named_arguments(call)
    arrays: dict[str, Any] = dict(labelled_arrays(arguments))
    np.savez(operands, **arrays)
    numbers: dict[str, Any] = {"eps": EPS}  # a norm's backward is given 1 / sqrt instead
    for name, value in arguments.items():
        parts = value._asdict() if hasattr(value, "_asdict") else {}
        fields = {name: value} | {f"{name}.{field}": part for field, part in parts.items()}
        numbers |= {
            label: part for label, part in fields.items() if isinstance(part, str | int | float)
        }
    return {"operation": call.operation, "numbers": numbers}
