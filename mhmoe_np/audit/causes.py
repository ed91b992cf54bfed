"""A trace against a checkpoint: which layer is wrong, and why.

Each layer is computed from the other's inputs (`from_inputs`). One that differs is computed again with
every hypothesis, and in a BitNet model with its tied activations rounded either way [D9].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from mhmoe_np.audit.comparison import Comparison, Row, compare_tensors, compare_traces
from mhmoe_np.audit.difference import Tensor
from mhmoe_np.audit.from_inputs import Ids, Layer, ids_of, layer_from, model_from, others_of, taken
from mhmoe_np.audit.given import Given, Others, Tie
from mhmoe_np.audit.hypotheses import (
    EPSILONS,
    HYPOTHESES,
    Change,
    alone,
    changed,
    half_away_from_zero,
    tensors_of,
)
from mhmoe_np.audit.losses_otherwise import cause_of_loss
from mhmoe_np.audit.trace_file import Trace
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.types import FloatArray, IntArray

MOST_TIES = 8  # of one token in one layer: each doubles the ways to round that are tried
Kind = Literal["cause", "tie", "unexplained"]


class Finding(NamedTuple):
    """What there is to say of one layer or one other part."""

    where: str  # "layers.1", "logits", "aux_loss", ...
    kind: Kind
    text: str


class Diagnosis(NamedTuple):
    """A trace against a checkpoint."""

    comparison: Comparison  # their tensors first, then ours from their inputs
    findings: list[Finding]  # in the order of computation


class _Case(NamedTuple):
    """One layer's inputs, and what came out of it there."""

    number: int
    theirs: Trace  # by names within the layer
    x_ND: FloatArray
    others: Others
    sequences: int
    tolerance: float | None

    def agrees(self, ours: Trace) -> bool:
        """Whether every tensor that they have comes out."""
        return all(
            compare_tensors(name, self.theirs, ours, tolerance=self.tolerance).verdict != "different"
            for name in self.theirs
        )

    def close_tokens(self, ours: Trace) -> Tensor:
        """Which tokens' rows come out in every tensor."""
        close = np.ones(len(self.x_ND), bool)
        for name in ("router_logits", "hidden"):
            if name in self.theirs:
                row = compare_tensors(name, self.theirs, ours, tolerance=self.tolerance)
                a, b = self.theirs[name], ours[name].reshape(self.theirs[name].shape)
                scale = max(np.abs(a).max(), np.abs(b).max())
                near = np.abs(a - b) <= row.tolerance * scale
                close &= near.reshape(len(close), -1).all(axis=1)
        return close


def diagnose(
    theirs: Trace,
    parameters: Parameters,
    *,
    source: str,
    tolerance: float | None = None,
    ops: Operations,
) -> Diagnosis:
    """Compare a trace with what its own numbers give in the model with these parameters.

    source: the trace's name in messages. ops: of the host, as those of `numpy`.

    Raises UserError: the trace lacks `input_ids`, or they are no ids of this model.
    """
    with np.errstate(all="ignore"):  # what is not finite is what is being looked for
        model = Model.of(parameters, ops=ops)
        ids = ids_of(theirs, model.config, source=source)
        ours = model_from(theirs, model, ids, {}, ops=Given(ops))
        comparison = compare_traces(theirs, ours, tolerance=tolerance)
        findings, codes = [], {}
        wrong = {row.name for row in comparison.rows if row.verdict == "different"}
        likely: str | None = None
        for number in range(model.config.num_hidden_layers):
            names = [f"layers.{number}.{name}" for name in ("router_logits", "experts", "hidden")]
            if not wrong & set(names):
                continue
            case = _case(number, theirs, ours, model, ids, tolerance)
            finding, code_N = _of_layer(case, parameters, model, likely, ops=ops)
            findings.append(finding)
            likely = finding.text if finding.kind == "cause" else likely
            if code_N is not None:
                codes[number] = code_N
        if codes:
            ours = model_from(theirs, model, ids, codes, ops=Given(ops))
            comparison = compare_traces(theirs, ours, tolerance=tolerance)
            wrong = {row.name for row in comparison.rows if row.verdict == "different"}
        if "logits" in wrong:
            findings.append(_of_logits(theirs, ours, parameters, tolerance, ops=ops))
        findings += [
            Finding(name, "cause", text)
            for name in ("aux_loss", "z_loss", "loss")
            if name in wrong and (text := cause_of_loss(name, theirs, model.config, tolerance))
        ]
    return Diagnosis(comparison, [*findings, *_of_the_rest(comparison, findings)])


def _case(
    number: int, theirs: Trace, ours: Trace, model: Model, ids: Ids, tolerance: float | None
) -> _Case:
    config, dtype = model.config, model.weights.dtype
    N = ids.id_BT.size
    if number == 0:
        x_ND = model.weights.embedding_VD[ids.id_BT.ravel()]
    else:
        before = f"layers.{number - 1}.hidden"
        x_ND = taken(theirs, before, ours[before]).reshape(N, -1)
    prefix = f"layers.{number}."
    own = {
        name: theirs[prefix + name]
        for name in ("router_logits", "experts", "hidden")
        if prefix + name in theirs and prefix + name in ours
    }
    others = others_of(theirs, number, config, dtype, sub_tokens=N * config.moe_heads)
    return _Case(number, own, x_ND, others, len(ids.id_BT), tolerance)


def _of_layer(
    case: _Case, parameters: Parameters, model: Model, likely: str | None, *, ops: Operations
) -> tuple[Finding, IntArray | None]:
    """Why a layer differs; where ties alone explain it, how its activations are rounded.

    likely: the cause of the layer before, which is tried first.
    """
    where = f"layers.{case.number}"
    config, tensors = alone(model.config, case.number), tensors_of(parameters, case.number)

    def explains(change: Change) -> bool:
        layer, given = changed(config, tensors, change, ops=ops)
        code_N = np.zeros(len(case.x_ND), np.int64)
        ours, _ = layer_from(
            layer, case.x_ND, case.others, code_N, None, sequences=case.sequences, ops=given
        )
        return case.agrees(ours)

    # Before the ties: those that lie exactly half-way are the specification's to decide.
    for change in half_away_from_zero(config, tensors):
        if explains(change):
            return Finding(where, "cause", change.cause), None
    if config.is_quantised and (settled := _by_ties(case, Layer.of(model, case.number), ops=ops)):
        code_N, ties = settled
        return Finding(where, "tie", _said_of(ties)), code_N
    changes = [change for hypothesis in HYPOTHESES for change in hypothesis(config, tensors)]
    for change in sorted(changes, key=lambda change: change.cause != likely):
        if explains(change):
            return Finding(where, "cause", change.cause), None
    return Finding(where, "unexplained", "no single change of the layer gives these numbers"), None


def _by_ties(case: _Case, layer: Layer, *, ops: Operations) -> tuple[IntArray, list[Tie]] | None:
    """How each token's tied activations must be rounded for the other's numbers to come out.

    Every way is tried, for all tokens at once; a token takes the first with which its rows come out.
    """
    code_N, open_N = np.zeros(len(case.x_ND), np.int64), np.ones(len(case.x_ND), bool)
    given, most = Given(ops), 0
    for code in range(1 << MOST_TIES):
        ours, _ = layer_from(
            layer,
            case.x_ND,
            case.others,
            np.where(open_N, code, code_N),
            None,
            sequences=case.sequences,
            ops=given,
        )
        most = max(most, int(given.met_N[open_N].max(initial=0)))
        found_N = open_N & case.close_tokens(ours)
        code_N[found_N] = code
        open_N &= ~found_N
        if not open_N.any() or code + 1 >= 1 << most:
            break
    ours, _ = layer_from(
        layer, case.x_ND, case.others, code_N, None, sequences=case.sequences, ops=given
    )
    return (code_N, given.turned) if case.agrees(ours) else None


def _said_of(ties: list[Tie]) -> str:
    tie = ties[0]
    count = "1 activation lies" if len(ties) == 1 else f"{len(ties)} activations lie"
    return (
        f"{count} at the quantiser's tie and rounded to the other side there, one step of 1/127 (D9); "
        f"the first is the input of {tie.weight}, row {tie.row}, column {tie.column}: "
        f"x * 127/gamma = {tie.product:.12g}"
    )


def _of_logits(
    theirs: Trace, ours: Trace, parameters: Parameters, tolerance: float | None, *, ops: Operations
) -> Finding:
    """Why the logits differ, given the last hidden state."""
    config = parameters.config
    last = f"layers.{config.num_hidden_layers - 1}.hidden"
    x_ND = taken(theirs, last, ours[last]).reshape(-1, config.hidden_size)
    for cause, y_ND in _other_norms(x_ND, parameters, ops=ops):
        logits = ops.linear(y_ND, parameters.output_VD, None).reshape(ours["logits"].shape)
        row = compare_tensors("logits", theirs, {"logits": logits}, tolerance=tolerance)
        if row.verdict == "same":
            return Finding("logits", "cause", cause)
    return Finding("logits", "unexplained", "no single change of final norm or head gives them")


def _other_norms(
    x_ND: FloatArray, parameters: Parameters, *, ops: Operations
) -> Iterator[tuple[str, FloatArray]]:
    """What the output head may have been given instead of the final norm's output."""
    weight_D, own = parameters.arrays["model.norm.weight"], parameters.config.rms_norm_eps
    yield "the final norm is left out", x_ND
    unit_D = np.ones_like(weight_D)
    yield "model.norm.weight is not applied", ops.rms_norm(x_ND, unit_D, eps=own)[0]
    yield "model.norm.weight is applied as 1 + weight", ops.rms_norm(x_ND, 1 + weight_D, eps=own)[0]
    for eps in EPSILONS:
        if eps != own:
            cause = f"rms_norm_eps is {eps:g} and not {own:g}"
            yield cause, ops.rms_norm(x_ND, weight_D, eps=eps)[0]


def _of_the_rest(comparison: Comparison, findings: list[Finding]) -> Iterator[Finding]:
    """The first difference of what no finding speaks of: losses, then gradients."""
    spoken = tuple(finding.where for finding in findings)
    rest = [
        row
        for row in comparison.rows
        if row.verdict == "different" and not row.name.startswith(spoken or ("\0",))
    ]
    forward = next((row for row in rest if not row.name.startswith("grad.")), None)
    gradient = next((row for row in rest if row.name.startswith("grad.")), None)
    if forward is not None:
        yield Finding(forward.name, "unexplained", forward.note or "no pattern is recognised")
    if gradient is not None:
        yield Finding(gradient.name, "unexplained", _said_of_gradient(gradient, rest, findings))


def _said_of_gradient(row: Row, rest: list[Row], findings: list[Finding]) -> str:
    count = sum(other.name.startswith("grad.") for other in rest)
    text = f"the first of {count} gradients that differ"
    if any(finding.kind != "tie" for finding in findings):
        text += ", as they must after a forward that does"
    return f"{text}; {row.note}" if row.note else text
