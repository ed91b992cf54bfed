"""Every claim computed once: operations, layers, models, parity, and what they were computed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from mhmoe_np.audit.agreement import agreement, results_of
from mhmoe_np.audit.calls import calls
from mhmoe_np.audit.entries import Entry, backward_of, layer_entries, operation_entries
from mhmoe_np.audit.gradcheck import check_all
from mhmoe_np.audit.peers import PEERS, ask
from mhmoe_np.costs.parity import ParityRow, paper_rows
from mhmoe_np.errors import UserError
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import BackendName, Operations
from mhmoe_np.report.claims import Claim, as_dicts, of_agreement, of_gradient, of_parity, worst
from mhmoe_np.training.environment import environment

MODEL = "model: "  # how gradient checks of whole models are named
BASELINE = "smoe"  # whose cost the paper's models have
FLOAT_TYPES = "float64", "float32"
KINDS = "gradient", "backend", "peer"  # of claims about operations, in an overview's order

Load = Callable[[BackendName], Operations]
Tell = Callable[[str], object]


class Column(NamedTuple):
    """One kind of claim about operations, by one backend or peer in one float type."""

    title: str
    kind: str
    by: str
    dtype: str


class Subject(NamedTuple):
    """An operation, a kind of model or a row of the paper's table, and what is claimed of it."""

    name: str
    claims: list[Claim]

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(claim.passed for claim in self.claims)

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.claims:
            return "nothing claimed"
        return "holds" if self.passed else "FAILED"

    def at(self, column: Column) -> Claim | None:
        """The claim of a column that is nearest to its bound."""
        return worst(
            [claim for claim in self.claims if (claim.kind, claim.by, claim.dtype) == column[1:]]
        )


class Report(NamedTuple):
    """What was computed, and what came out."""

    environment: dict[str, Any]
    backends: dict[str, str]  # name -> what was done with it
    peers: dict[str, str]  # title -> its version, or why nothing was compared
    entries: dict[str, Entry]
    operations: list[Subject]
    layers: list[Entry]
    models: list[Subject]
    parity_rows: list[ParityRow]
    parity: list[Subject]
    seconds: float

    @property
    def subjects(self) -> Iterator[Subject]:
        """All that claims are made of."""
        yield from (*self.operations, *self.models, *self.parity)

    @property
    def claims(self) -> list[Claim]:
        """All claims."""
        return [claim for subject in self.subjects for claim in subject.claims]

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(claim.passed for claim in self.claims)

    @property
    def columns(self) -> list[Column]:
        """What an overview of the operations shows beside each other."""
        found = dict.fromkeys(
            (claim.kind, claim.by, claim.dtype)
            for subject in self.operations
            for claim in subject.claims
        )
        order = [*self.backends, *self.peers]
        return [
            Column(f"{by} gradient" if kind == "gradient" else f"{by} {dtype}", kind, by, dtype)
            for kind, by, dtype in sorted(
                found, key=lambda key: (KINDS.index(key[0]), order.index(key[1]))
            )
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, of numbers, texts, lists and dictionaries."""
        return {
            "passed": self.passed,
            "claims": len(self.claims),
            "failed": sum(not claim.passed for claim in self.claims),
            "seconds": self.seconds,
            "environment": self.environment,
            "backends": self.backends,
            "peers": self.peers,
            "operations": [
                self.entries[subject.name].as_dict() | {"claims": as_dicts(subject.claims)}
                for subject in self.operations
            ],
            "layers": [entry.as_dict() for entry in self.layers],
            "models": [
                {"name": subject.name, "claims": as_dicts(subject.claims)} for subject in self.models
            ],
            "parity": [
                row._asdict() | {"claims": as_dicts(subject.claims)}
                for row, subject in zip(self.parity_rows, self.parity, strict=True)
            ],
        }


def make_report(names: Sequence[BackendName], *, load: Load, tell: Tell) -> Report:
    """Compute every claim.

    names: the backends whose gradients are checked and that are compared with the definition. A GPU
    that is there is compared too.
    load: makes a backend.
    tell: is told what is being computed.

    Raises UserError: see `load`.
    """
    start = time.perf_counter()
    # First, for it sets the threads of BLAS, which the fast backends set otherwise.
    definition = load_operations("numpy")
    entries = operation_entries()
    found: dict[str, list[Claim]] = {name: [] for name in entries}
    models: dict[str, list[Claim]] = {}
    backends: dict[str, str] = {}
    for name in names:
        ops = load(name)
        backends[name] = "gradients checked"
        for check in check_all(ops):
            tell(f"{name}: {check.name}")
            if check.name.startswith(MODEL):
                kind = check.name.removeprefix(MODEL)
                models.setdefault(kind, []).append(of_gradient(name, check))
            else:
                found[backward_of(check.name)].append(of_gradient(name, check))
        if name != "numpy":
            backends[name] += ", compared with numpy"
            _compare(ops, definition, found, tell)
    surroundings = environment(threads=cores(), ops=ops)
    if "cuda" not in names:
        backends["cuda"] = _compare_gpu(definition, found, tell)
    peers = {}
    tell("PyTorch and Hugging Face: all operations beside numpy")
    for peer, state, agreements in ask(PEERS, definition=definition):
        peers[peer.title] = state
        for agreed in agreements:
            found[agreed.operation].append(of_agreement("peer", peer.title, agreed))
    rows = paper_rows()
    baseline = next(row for row in rows if row.name == BASELINE)
    return Report(
        environment={"mhmoe-np": version("mhmoe-np"), **surroundings, "backend": ", ".join(names)},
        backends=backends,
        peers=peers,
        entries=entries,
        operations=[Subject(name, claims) for name, claims in found.items()],
        layers=layer_entries(),
        models=[Subject(kind, claims) for kind, claims in models.items()],
        parity_rows=rows,
        parity=[Subject(row.name, [of_parity(row, baseline)]) for row in rows],
        seconds=time.perf_counter() - start,
    )


def _compare(
    ops: Operations, definition: Operations, found: dict[str, list[Claim]], tell: Tell
) -> None:
    """Hold every operation of a backend against the definition, in both float types."""
    for dtype in FLOAT_TYPES:
        tell(f"{ops.name}: all operations in {dtype} beside numpy")
        for call in calls(dtype, definition=definition):
            expected = results_of(call, definition)
            agreed = agreement(call, results_of(call, ops), expected, dtype=dtype)
            found[call.operation].append(of_agreement("backend", ops.name, agreed))


def _compare_gpu(definition: Operations, found: dict[str, list[Claim]], tell: Tell) -> str:
    """The same of the GPU, if there is one; what was done, or why not."""
    try:
        ops = load_operations("cuda")
    except UserError as error:
        return f"not compared: {str(error).partition(': ')[2].partition(';')[0]}"
    _compare(ops, definition, found, tell)
    return "compared with numpy"
