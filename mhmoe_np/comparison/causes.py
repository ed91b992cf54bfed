"""A trace against a checkpoint: which layer is wrong, and why.

Each layer is computed from the other's inputs (`from_inputs`). One that differs is computed again with
every hypothesis, and in a BitNet model with its tied activations rounded either way [D9].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from mhmoe_np.comparison.expert_order import cause_in_order
from mhmoe_np.comparison.from_inputs import Ids, Layer, ids_of, model_from, taken
from mhmoe_np.comparison.from_operands import operations_from
from mhmoe_np.comparison.given import Given
from mhmoe_np.comparison.hypotheses import (
    EPSILONS,
    HYPOTHESES,
    Hypothesis,
    alone,
    changed,
    half_away_from_zero,
    tensors_of,
)
from mhmoe_np.comparison.losses_otherwise import cause_of_loss
from mhmoe_np.comparison.one_layer import NAMES, Case
from mhmoe_np.comparison.quantiser_ties import first_way, said_of, settled_by_gradients, ways_of
from mhmoe_np.comparison.trace_file import Trace
from mhmoe_np.comparison.two_traces import Comparison, Row, compare_tensors, compare_traces
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.table import Operations
from mhmoe_np.progress import OnProgress, unseen
from mhmoe_np.types import FloatArray, IntArray

Kind = Literal["cause", "tie", "unexplained"]


class Finding(NamedTuple):
    """What there is to say of one layer or one other part."""

    where: str  # "layers.1", "logits", "aux_loss", ...
    kind: Kind
    text: str
    operation: str = ""  # the layer's first result that differs from what its own operands give


class Diagnosis(NamedTuple):
    """A trace against a checkpoint."""

    comparison: Comparison  # their tensors first, then ours from their inputs
    findings: list[Finding]  # in the order of computation


def diagnose(
    theirs: Trace,
    parameters: Parameters,
    *,
    source: str,
    tolerance: float | None = None,
    ops: Operations,
    on_progress: OnProgress = unseen,
) -> Diagnosis:
    """Compare a trace with what its own numbers give in the model with these parameters.

    source: the trace's name in messages. ops: of the host, as those of `numpy`.
    on_progress: counts layers, once all are computed.

    Raises UserError: the trace lacks `input_ids`, or they are no ids of this model.
    """
    on_progress("computing from its numbers", 0, 0)
    with np.errstate(all="ignore"):  # what is not finite is what is being looked for
        model = Model.of(parameters, ops=ops)
        ids = ids_of(theirs, model.config, source=source)
        operations = operations_from(theirs, model, parameters, sequences=len(ids.id_BT), ops=ops)
        ours = operations | model_from(theirs, model, ids, {}, ops=Given(ops))
        comparison = compare_traces(theirs, ours, tolerance=tolerance)
        wrong = _wrong_in(comparison)
        findings: list[Finding] = []
        codes: dict[int, IntArray] = {}
        for number in range(model.config.num_hidden_layers):
            on_progress("looking for causes", number, model.config.num_hidden_layers)
            if wrong & {f"layers.{number}.{name}" for name in NAMES}:
                case = Case.of(number, theirs, ours, model, ids, tolerance=tolerance)
                found = _of_layer(case, parameters, model, ops=ops)
                if isinstance(found, Finding):
                    findings.append(found)
                else:
                    codes[number] = found
        if model.config.is_quantised and (codes or _only_gradients(wrong)):
            ours, ties = _with_ties(theirs, ours, codes, model, ids, tolerance, ops=ops)
            comparison = compare_traces(theirs, operations | ours, tolerance=tolerance)
            wrong = _wrong_in(comparison)
            findings += ties
            findings.sort(key=lambda finding: int(finding.where.removeprefix("layers.")))
        if "logits" in wrong:
            findings.append(_of_logits(theirs, ours, parameters, tolerance, ops=ops))
        findings += [
            Finding(name, "cause", text)
            for name in ("aux_loss", "z_loss", "loss")
            if name in wrong and (text := cause_of_loss(name, theirs, model.config, tolerance))
        ]
        given = {"input_ids", "target_ids"}  # of these all is computed
        comparison = comparison._replace(
            only_first=[name for name in comparison.only_first if name not in given]
        )
        findings = [_completed(finding, comparison) for finding in findings]
    return Diagnosis(comparison, [*findings, *_of_the_rest(comparison, findings)])


def _wrong_in(comparison: Comparison) -> set[str]:
    return {row.name for row in comparison.rows if row.verdict == "different"}


def _only_gradients(wrong: set[str]) -> bool:
    return bool(wrong) and all(name.startswith("grad.") for name in wrong)


def _of_layer(
    case: Case, parameters: Parameters, model: Model, *, ops: Operations
) -> Finding | IntArray:
    """Why a layer differs; where ties alone explain it, how its activations are rounded."""
    where = f"layers.{case.number}"
    config, tensors = alone(model.config, case.number), tensors_of(parameters, case.number)

    def explanation(hypothesis: Hypothesis) -> Finding | None:
        """The change that comes nearest of those with which the numbers come out."""
        near: list[tuple[float, str]] = []
        for change in hypothesis(config, tensors):
            layer, given = changed(config, tensors, change, ops=ops)
            computed = case.computed(layer, None, given)
            distance = case.distance(computed)
            # Nearly: what is left may be ties of the layer so changed.
            if distance is None and config.is_quantised and case.close_tokens(computed).mean() > 0.5:
                code_N = first_way(ways_of(case, layer, given))
                if code_N is not None:
                    distance = case.distance(case.computed(layer, code_N, given))
            if distance is not None:
                near.append((distance, change.cause))
        return Finding(where, "cause", min(near)[1]) if near else None

    # Before the ties: those that lie exactly half-way are the specification's to decide.
    if found := explanation(half_away_from_zero):
        return found
    if config.is_quantised:
        layer = Layer.of(model, case.number)
        code_N = first_way(ways_of(case, layer, Given(ops)))
        if code_N is not None and case.distance(case.computed(layer, code_N, Given(ops))) is not None:
            return code_N
    for hypothesis in HYPOTHESES:
        if found := explanation(hypothesis):
            return found
    if cause := cause_in_order(case, config, tensors, ops=ops):
        return Finding(where, "cause", cause)
    return Finding(where, "unexplained", "no single change of the layer gives these numbers")


def _with_ties(
    theirs: Trace,
    ours: Trace,
    codes: dict[int, IntArray],
    model: Model,
    ids: Ids,
    tolerance: float | None,
    *,
    ops: Operations,
) -> tuple[Trace, list[Finding]]:
    """Our tensors with activations at ties rounded as there, and what is to be said of it.

    codes: of layers whose output told it.
    """

    def compute(codes: Mapping[int, IntArray]) -> Trace:
        return model_from(theirs, model, ids, codes, ops=Given(ops))

    cases = {
        number: Case.of(number, theirs, ours, model, ids, tolerance=tolerance)
        for number in range(model.config.num_hidden_layers)
    }
    ours = compute(codes)
    if _only_gradients(_wrong_in(compare_traces(theirs, ours, tolerance=tolerance))):
        ways = {
            number: ways_of(case, Layer.of(model, number), Given(ops)) for number, case in cases.items()
        }
        firsts = {number: first_way(each) for number, each in ways.items()}
        codes = {number: code_N for number, code_N in firsts.items() if code_N is not None} | codes
        ways = {number: each for number, each in ways.items() if number in codes}
        codes = settled_by_gradients(theirs, ways, codes, compute)
        ours = compute(codes)
    findings = []
    for number, code_N in codes.items():
        given = Given(ops)
        cases[number].computed(Layer.of(model, number), code_N, given)
        if given.turned:
            findings.append(Finding(f"layers.{number}", "tie", said_of(given.turned)))
    return ours, findings


def _of_logits(
    theirs: Trace, ours: Trace, parameters: Parameters, tolerance: float | None, *, ops: Operations
) -> Finding:
    """Why the logits differ, given the last hidden state."""
    config = parameters.config
    last = f"layers.{config.num_hidden_layers - 1}.hidden"
    x_ND = taken(theirs, last, ours[last]).reshape(-1, config.hidden_size)
    near: list[tuple[float, str]] = []
    for cause, y_ND in _other_norms(x_ND, parameters, ops=ops):
        logits = ops.linear(y_ND, parameters.output_VD, None).reshape(ours["logits"].shape)
        row = compare_tensors("logits", theirs, {"logits": logits}, tolerance=tolerance)
        if row.verdict == "same" and row.difference is not None:
            near.append((row.difference.max_rel, cause))
    if near:
        return Finding("logits", "cause", min(near)[1])
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


def _completed(finding: Finding, comparison: Comparison) -> Finding:
    """With the layer's first operation that is wrong by itself and, without a cause, with patterns."""
    own = {f"{finding.where}.{name}" for name in NAMES}
    for row in comparison.rows:
        if row.verdict != "different" or not row.name.startswith(f"{finding.where}."):
            continue
        if row.name not in own and not finding.operation:
            finding = finding._replace(operation=row.name)
        if row.name in own and row.note and finding.kind == "unexplained":
            name = row.name.rpartition(".")[2]
            finding = finding._replace(text=f"{finding.text}; {name}: {row.note}")
    return finding


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
