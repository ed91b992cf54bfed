"""A claim: an error, what it must stay below, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mhmoe_np.audit.agreement import Agreement
from mhmoe_np.audit.derivative import GradientCheck
from mhmoe_np.costs.parity import ParityRow

Kind = Literal["gradient", "backend", "peer", "cost"]


class Claim(NamedTuple):
    """One thing that must hold, and how far it is from not holding."""

    kind: Kind
    by: str  # the backend, peer or model that is held to it
    case: str  # which form of it; empty where there is one
    dtype: str
    error: float
    bound: float  # 0: not the least difference
    passed: bool
    same_bits: bool
    where: str  # the error is, or how a failure looks

    @property
    def verdict(self) -> str:
        """In words."""
        return "holds" if self.passed else "FAILED"

    @property
    def shown(self) -> str:
        """The error as a reader wants it."""
        return "same bits" if self.same_bits else f"{self.error:.1e}"

    @property
    def share(self) -> float:
        """Of the bound: what claims of several bounds are compared by."""
        if not self.passed:
            return math.inf
        return self.error / self.bound if self.bound else 0.0


def of_gradient(backend: str, check: GradientCheck) -> Claim:
    """That a backward agrees with central differences of its forward."""
    where = check.argument
    if check.entry is not None:
        place, numeric, analytic = check.entry
        where += f"{list(place)}: {numeric:.10g} by differences, {analytic:.10g} by the backward"
    _, bracket, form = check.name.rstrip("]").partition("[")
    return Claim(
        "gradient",
        by=backend,
        case=form if bracket else "",
        dtype="float64",
        error=check.max_rel_error,
        bound=check.bound,
        passed=check.passed,
        same_bits=False,
        where=where,
    )


def of_agreement(kind: Literal["backend", "peer"], by: str, found: Agreement) -> Claim:
    """That a backend or a peer computes what the definition does."""
    return Claim(
        kind,
        by=by,
        case=found.form,
        dtype=found.dtype,
        error=found.max_rel_error,
        bound=found.bound,
        passed=found.passed,
        same_bits=found.same_bits,
        where=found.array,
    )


def of_parity(row: ParityRow, baseline: ParityRow) -> Claim:
    """That a model of the paper's table costs a token what the baseline does."""
    difference = abs(row.macs_per_token - baseline.macs_per_token)
    return Claim(
        "cost",
        by=row.name,
        case="",
        dtype="",
        error=difference / baseline.macs_per_token,
        bound=0.0,
        passed=difference == 0,
        same_bits=False,
        where="multiply-adds a token and layer",
    )


def worst(claims: Sequence[Claim]) -> Claim | None:
    """The one nearest to its bound, or beyond it; None of none."""
    return max(claims, key=lambda claim: claim.share, default=None)


def as_dicts(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """All fields of each."""
    return [claim._asdict() for claim in claims]
