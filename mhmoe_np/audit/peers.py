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


def ask(peer: Peer, *, definition: Operations) -> Answer:
    """Have a peer compute what it can of all calls, and compare it with the definition."""
    missing = [module for module in peer.modules if importlib.util.find_spec(module) is None]
    if missing:
        return Answer(peer, f"not compared: {missing[0]} is not installed", ())
    asked = [call for call in calls(peer.dtype, definition=definition) if not _is_quantised(call)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = [_request(call, folder / f"{i}.npz") for i, call in enumerate(asked)]
        (folder / "calls.json").write_text(json.dumps({"peer": peer.name, "calls": requests}))
        command = [sys.executable, "-P", str(SCRIPT), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return Answer(peer, f"not compared: it took more than {TIME_LIMIT} s", ())
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
            return Answer(peer, f"not compared: {said[-1]}", ())
        agreements = tuple(
            _compared(call, answer, peer, definition)
            for i, call in enumerate(asked)
            if (answer := folder / f"{i}.out.npz").exists()
        )
        return Answer(peer, (folder / "version").read_text(), agreements)


def _is_quantised(call: Call) -> bool:
    """Peers have no quantised weights."""
    return any(isinstance(value, BitWeight | PackedWeight) for value in call.arguments)


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


def _compared(call: Call, answer: Path, peer: Peer, definition: Operations) -> Agreement:
    with np.load(answer) as file:
        actual = dict(file)
    # What backends owe each other to the bit, another implementation may round differently.
    call = call._replace(exact=False)
    return agreement(call, actual, results_of(call, definition), dtype=peer.dtype)
