"""`compare` on traces of the independent PyTorch model, with mistakes planted into it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mhmoe_np.audit.models import BASE, KINDS
from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.comparison.from_inputs import ids_of
from mhmoe_np.comparison.hypotheses import HYPOTHESES, Change, alone, changed, tensors_of
from mhmoe_np.comparison.one_layer import Case
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.storage.tensors import save_tensors
from tests.conftest import Run
from tests.oracle import torch_model as oracle

Patch = pytest.MonkeyPatch
TOKENS = np.random.default_rng(3).integers(0, 37, (2, 9))
TOKENS[1, 7:] = -100
MH2 = KINDS["mh2"]


def model_at(
    path: Path,
    keys: dict[str, Any],
    *,
    seed: int = 2,
    halves: bool = False,
    tied_experts: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint and return its tensors; norms and biases are not what they start as.

    halves: weights of 1/16 and 3/16 in equal number, whose quotients by their mean are 1/2 and 3/2.
    tied_experts: two that have one row of every router.
    """
    parameters = Parameters(ModelConfig.model_validate({**BASE, **keys}), np.float64)
    initialise(parameters, seed)
    rng = np.random.default_rng(seed)
    for name, tensor in parameters.tensors.items():
        if tensor.ndim == 1:
            tensor += rng.normal(0, 0.1, tensor.shape)
        elif halves and "_proj" in name:
            magnitude = rng.permutation(np.resize([1, 3], tensor.size)).reshape(tensor.shape) / 16
            tensor[...] = np.where(tensor < 0, -magnitude, magnitude)
        elif tied_experts is not None and name.endswith("mlp.gate.weight"):
            tensor[tied_experts[1]] = tensor[tied_experts[0]]
    path.mkdir()
    save_model(path, parameters, None)
    return {name: np.ascontiguousarray(tensor) for name, tensor in parameters.tensors.items()}


def write_theirs(
    path: Path, keys: dict[str, Any], weights: dict[str, Any], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    tensors = oracle.trace({**BASE, **keys}, weights, TOKENS, dtype=dtype)
    save_tensors(path, tensors)
    return tensors


# ---- twelve faults -----------------------------------------------------------------------------


class Fault(NamedTuple):
    """A mistake, and what `compare` must say of it."""

    plant: Callable[[Patch, dict[str, Any]], None]  # may change the weights that the other model has
    keys: dict[str, Any]
    first: str  # the first tensor that differs
    where: list[str]
    cause: str
    halves: bool = False
    seed: int = 2
    of_logits: Mapping[str, str] = MappingProxyType({})  # the cause there, where it is said otherwise


def transposed(patch: Patch, weights: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = np.ascontiguousarray(weights[name].T)


def gate_and_up_exchanged(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.ffn

    def ffn(config: Any, weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
        gate, up = f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"
        return right(config, weights | {gate: weights[up], up: weights[gate]}, prefix, x)

    patch.setattr(oracle, "ffn", ffn)


def interleaved_rotation(patch: Patch, weights: dict[str, Any]) -> None:
    def rotate(x: Tensor, theta: float) -> Tensor:
        T, C = x.shape[1], x.shape[3]
        angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        turned = torch.view_as_complex(x.reshape(*x.shape[:3], C // 2, 2)) * torch.polar(
            torch.ones_like(angle), angle
        )[:, None].to(torch.complex128)
        return torch.view_as_real(turned).flatten(3)

    patch.setattr(oracle, "rotate", rotate)


def not_scaled(patch: Patch, weights: dict[str, Any]) -> None:
    patch.setattr(oracle, "math", SimpleNamespace(sqrt=lambda _: 1.0, inf=math.inf, ceil=math.ceil))


def gates_not_renormalised(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.route
    patch.setattr(
        oracle,
        "route",
        lambda config, *rest: right(dataclasses.replace(config, norm_topk_prob=False), *rest),
    )


def experts_permuted(patch: Patch, weights: dict[str, Any]) -> None:
    for name in list(weights):
        if ".experts.1." in name:
            other = name.replace(".experts.1.", ".experts.3.")
            weights[name], weights[other] = weights[other], weights[name]


def experts_shuffled(patch: Patch, weights: dict[str, Any]) -> None:
    right = dict(weights)
    for name in right:
        before, experts, rest = name.partition(".experts.")
        if experts:
            number, _, part = rest.partition(".")
            weights[name] = right[f"{before}.experts.{[2, 0, 4, 1, 3][int(number)]}.{part}"]


def another_epsilon(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.rms_norm
    patch.setattr(oracle, "rms_norm", lambda x, weight, eps: right(x, weight, 1e-6))


def no_head_layer(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.projection
    patch.setattr(
        oracle,
        "projection",
        lambda config, weights, name, x: x if "head" in name else right(config, weights, name, x),
    )


def heads_interleaved(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.projection

    def projection(config: Any, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        N, D = x.shape
        H = config.moe_heads
        if "head" in name:
            y = right(config, weights, name, x)
            return y.reshape(N, D // H, H).transpose(1, 2).reshape(N, D)
        return right(config, weights, name, x.reshape(N, H, D // H).transpose(1, 2).reshape(N, D))

    patch.setattr(oracle, "projection", projection)


def merge_before_the_gates(patch: Patch, weights: dict[str, Any]) -> None:
    right, project = oracle.run_experts, oracle.projection

    def run_experts(config: Any, weights: Any, prefix: str, x: Tensor, routing: Any) -> Tensor:
        y = torch.zeros_like(x)
        for j in range(config.num_experts_per_tok):
            gates = torch.zeros_like(routing.gates)
            gates[:, j] = 1
            one = dataclasses.replace(routing, gates=gates)
            choice = right(config, weights, prefix, x, one).reshape(-1, config.hidden_size)
            merged = project(config, weights, f"{prefix}.merge_proj", choice)
            y = y + routing.gates[:, j, None] * merged.reshape(x.shape)
        return y

    patch.setattr(oracle, "run_experts", run_experts)
    patch.setattr(
        oracle,
        "projection",
        lambda config, weights, name, x: x if "merge" in name else project(config, weights, name, x),
    )


def wrong_first_choice(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.balance_loss
    patch.setattr(oracle, "balance_loss", lambda p, experts, kind: right(p, experts[:, -1:], kind))


def norms_of_one_more(patch: Patch, weights: dict[str, Any]) -> None:
    right = oracle.rms_norm
    patch.setattr(oracle, "rms_norm", lambda x, weight, eps: right(x, 1 + weight, eps))


def halves_away_from_zero(patch: Patch, weights: dict[str, Any]) -> None:
    torch_round = torch.round
    away = lambda x: torch.sign(x) * torch.floor(torch.abs(x) + 0.5)  # noqa: E731
    assert torch_round(torch.tensor(0.5)) == 0
    assert away(torch.tensor(0.5)) == 1
    patch.setattr(torch, "round", away)


BOTH = ["layers.0", "layers.1"]
SHARED = KINDS["mh3-shared-sub-norm"]
FAULTS = {
    "transposed weight": Fault(
        transposed, MH2, "layers.1.router_logits", ["layers.1"], "self_attn.o_proj.weight is transposed"
    ),
    "gate and up exchanged": Fault(
        gate_and_up_exchanged,
        KINDS["dense"],
        "layers.0.hidden",
        BOTH,
        "gate_proj and up_proj of mlp are exchanged",
    ),
    "interleaved RoPE": Fault(
        interleaved_rotation,
        KINDS["dense-grouped-heads"],
        "layers.0.hidden",
        BOTH,
        "rotary positions turn interleaved pairs (2j, 2j+1), not halves",
    ),
    "no 1/sqrt(C)": Fault(
        not_scaled,
        MH2,
        "layers.0.router_logits",
        BOTH,
        "the scale 1/sqrt(C) of the scores is missing",
    ),
    "no 1/sqrt(C), beside ties": Fault(
        not_scaled,
        KINDS["mh2-ternary-projections"],
        "layers.0.router_logits",
        BOTH,
        "the scale 1/sqrt(C) of the scores is missing",
        seed=7,
    ),
    "gates not renormalised": Fault(
        gates_not_renormalised,
        MH2,
        "layers.0.hidden",
        BOTH,
        "gates are not renormalised over the chosen experts",
    ),
    "permuted experts": Fault(
        experts_permuted, MH2, "layers.0.hidden", BOTH, "experts 1 and 3 are exchanged"
    ),
    "shuffled experts": Fault(
        experts_shuffled,
        MH2,
        "layers.0.hidden",
        BOTH,
        "the experts are in another order: 2, 0, 4, 1, 3",
    ),
    "shuffled experts, three heads": Fault(
        experts_shuffled,
        SHARED,
        "layers.0.hidden",
        BOTH,
        "the experts are in another order: 2, 0, 4, 1, 3",
    ),
    "gate and up exchanged, shared expert": Fault(
        gate_and_up_exchanged,
        SHARED,
        "layers.0.hidden",
        BOTH,
        "gate_proj and up_proj of mlp.experts and mlp.shared_expert are exchanged",
    ),
    "norms of 1 + weight": Fault(
        norms_of_one_more,
        KINDS["dense"],
        "layers.0.hidden",
        BOTH,
        "every norm's weight is applied as 1 + weight",
        of_logits={"logits": "model.norm.weight is applied as 1 + weight"},
    ),
    "another epsilon": Fault(
        another_epsilon,
        MH2,
        "layers.0.router_logits",
        [*BOTH, "logits"],
        "rms_norm_eps is 1e-06 and not 1e-05",
    ),
    "no head layer": Fault(
        no_head_layer, MH2, "layers.0.router_logits", BOTH, "the head layer is left out"
    ),
    "heads interleaved": Fault(
        heads_interleaved,
        MH2,
        "layers.0.router_logits",
        BOTH,
        "sub-tokens are interleaved features, not contiguous ones",
    ),
    "merge before the gates": Fault(
        merge_before_the_gates,
        MH2,
        "layers.0.hidden",
        BOTH,
        "the merge layer is applied before the gates",
    ),
    "merge before the gates, residual": Fault(
        merge_before_the_gates,
        KINDS["mh2-residual"],
        "layers.0.hidden",
        BOTH,
        "the merge layer is applied before the gates",
    ),
    "wrong first choice": Fault(
        wrong_first_choice,
        MH2,
        "aux_loss",
        ["aux_loss"],
        "shares are those of the last choices (experts[:, 1]), not of the first ones",
    ),
    "halves away from zero": Fault(
        halves_away_from_zero,
        KINDS["mh2-ternary"],
        "layers.0.router_logits",
        BOTH,
        "the quantisers round halves away from zero, not to even",
        halves=True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(
    name: str, tmp_path: Path, monkeypatch: Patch, mhmoe_here: Run
) -> None:
    fault = FAULTS[name]
    weights = model_at(tmp_path / "model", fault.keys, seed=fault.seed, halves=fault.halves)
    with monkeypatch.context() as patch:
        fault.plant(patch, weights)
        write_theirs(tmp_path / "wrong.safetensors", fault.keys, weights)
    result = mhmoe_here("compare", "wrong.safetensors", "--checkpoint", "model", "--json", code=1)
    found = json.loads(result.stdout)
    assert found["first_difference"] == fault.first
    causes = {each["where"]: each["text"] for each in found["findings"] if each["kind"] == "cause"}
    assert causes == dict.fromkeys(fault.where, fault.cause) | fault.of_logits
    others = [each for each in found["findings"] if each["kind"] != "cause"]
    assert all(each["where"].startswith("grad.") for each in others)


@pytest.mark.parametrize("halves", [False, True])
def test_without_a_fault_the_same_models_compare_clean(
    halves: bool, tmp_path: Path, mhmoe_here: Run
) -> None:
    keys = KINDS["mh2-ternary"] if halves else MH2
    weights = model_at(tmp_path / "model", keys, halves=halves)
    write_theirs(tmp_path / "right.safetensors", keys, weights)
    shown = mhmoe_here("compare", "right.safetensors", "--checkpoint", "model").stdout
    assert "tensors, all the same within tolerance" in shown
    assert "no failure" not in shown


def test_two_traces_name_the_first_tensor_and_say_what_is_missing(
    tmp_path: Path, monkeypatch: Patch, mhmoe_here: Run
) -> None:
    weights = model_at(tmp_path / "model", MH2)
    right = write_theirs(tmp_path / "right.safetensors", MH2, weights)
    no_head_layer(monkeypatch, weights)
    wrong = write_theirs(tmp_path / "wrong.safetensors", MH2, weights)
    del wrong["layers.1.hidden"]
    wrong["layers.0.attention"] = wrong["logits"]
    np.savez(tmp_path / "wrong.npz", **{f"x/{name}": tensor for name, tensor in wrong.items()})
    names = {f"x/{name}": name for name in wrong}
    (tmp_path / "names.json").write_text(json.dumps(names))
    arguments = ("compare", "wrong.npz", "right.safetensors", "--names", "names.json")
    found = json.loads(mhmoe_here(*arguments, "--json", code=1).stdout)
    assert found["first_difference"] == "layers.0.router_logits"
    assert found["only_first"] == ["layers.0.attention"]
    assert found["only_second"] == ["layers.1.hidden"]
    order = [row["name"] for row in found["tensors"]]
    assert order[:4] == ["input_ids", "target_ids", "layers.0.router_logits", "layers.0.experts"]
    gradients = [name.removeprefix("grad.") for name in order if name.startswith("grad.")]
    assert gradients[0] == "model.norm.weight"
    assert gradients[-1] == "model.embed_tokens.weight"
    row = next(row for row in found["tensors"] if row["name"] == "layers.0.router_logits")
    gap = np.abs(wrong["layers.0.router_logits"] - right["layers.0.router_logits"])
    place = np.unravel_index(gap.argmax(), gap.shape)
    assert row["difference"]["place"] == list(place)
    assert row["difference"]["max_abs"] == gap.max()
    assert row["difference"]["first"] == wrong["layers.0.router_logits"][place]
    shown = mhmoe_here(*arguments, code=1).stdout
    assert f"first difference: layers.0.router_logits[{place[0]}, {place[1]}] = " in shown
    assert "only in A: 1 tensors (layers.0.attention)" in shown
    assert "only in B: 1 tensors (layers.1.hidden)" in shown
    # A tolerance of 2 allows every float, and to it all logits are equal; no other integer may differ.
    allowed = json.loads(mhmoe_here(*arguments, "--tolerance", 2, "--json").stdout)
    assert {row["verdict"] for row in allowed["tensors"]} == {"same", "tie"}
    wrong["input_ids"][0, 0] += 1
    np.savez(tmp_path / "wrong.npz", **{f"x/{name}": tensor for name, tensor in wrong.items()})
    allowed = json.loads(mhmoe_here(*arguments, "--tolerance", 2, "--json", code=1).stdout)
    assert allowed["first_difference"] == "input_ids"


@pytest.mark.parametrize(
    "kind",
    [
        "dense-grouped-heads",
        "dense-relu2-sub-norm-untied",
        "mh2-bias",
        "mh2-no-head",
        "mh3-capacity-raw",
        "mh2-sign-projections-bias",
    ],
)
def test_every_hypothesis_changes_the_numbers(kind: str) -> None:
    """One that did not would explain whatever rounding leaves."""
    ops = load_operations("numpy")
    parameters = Parameters(ModelConfig.model_validate({**BASE, **KINDS[kind]}), np.float64)
    initialise(parameters, 1)
    for tensor in parameters.tensors.values():
        if tensor.ndim == 1:
            tensor += np.random.default_rng(1).normal(0, 0.1, tensor.shape)
    model = Model.of(parameters, ops=ops)
    theirs = trace(model, TOKENS, gradients=False, ops=ops)
    ids = ids_of(theirs, model.config, source="trace")
    case = Case.of(1, theirs, theirs, model, ids, tolerance=None)
    config, tensors = alone(model.config, 1), tensors_of(parameters, 1)
    unchanged = Change("")
    changes = [change for hypothesis in HYPOTHESES for change in hypothesis(config, tensors)]
    assert len(changes) > 20
    for change in [unchanged, *changes]:
        layer, given = changed(config, tensors, change, ops=ops)
        distance = case.distance(case.computed(layer, None, given))
        assert (distance is not None) == (change is unchanged), change.cause


# ---- what is no fault --------------------------------------------------------------------------

NO_SUB_NORM = {"use_sub_norm": False}  # so that a BitLinear reads another's output


@pytest.mark.parametrize("seed", [5, 7])
def test_a_quantised_head_layer_without_sub_norms_compares_clean_but_for_ties(
    seed: int, tmp_path: Path, mhmoe_here: Run
) -> None:
    """[D9]. Seed 7: the layer's output shows it. Seed 5: the merge layer's quantiser takes the step
    back, and the gradients alone show it.
    """
    keys = KINDS["mh2-ternary-projections"] | NO_SUB_NORM
    parameters = Parameters(ModelConfig.model_validate({**BASE, **keys}), np.float64)
    initialise(parameters, seed)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", parameters, None)
    weights = {name: np.ascontiguousarray(tensor) for name, tensor in parameters.tensors.items()}
    write_theirs(tmp_path / "theirs.safetensors", keys, weights)
    found = json.loads(
        mhmoe_here("compare", "theirs.safetensors", "--checkpoint", "model", "--json").stdout
    )
    assert found["same"]
    assert [finding["kind"] for finding in found["findings"]] == ["tie"]
    assert "= 63.5" in found["findings"][0]["text"].replace("-63.5", "63.5")
    shown = mhmoe_here("compare", "theirs.safetensors", "--checkpoint", "model").stdout
    assert "no failure: 1 activation lies at the quantiser's tie" in shown


def test_a_step_of_an_activation_that_is_at_no_tie_is_a_failure(
    tmp_path: Path, monkeypatch: Patch, mhmoe_here: Run
) -> None:
    keys = KINDS["mh2-ternary-projections"] | NO_SUB_NORM
    weights = model_at(tmp_path / "model", keys)
    right = oracle.quantize_rows

    def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        q, gamma = right(x)
        product = x[0] * (127 / gamma[0])
        farthest = int((product - torch.floor(product) - 0.5).abs().argmax())
        q[0, farthest] -= torch.sign(q[0, farthest])
        return q, gamma

    monkeypatch.setattr(oracle, "quantize_rows", quantize_rows)
    write_theirs(tmp_path / "theirs.safetensors", keys, weights)
    result = mhmoe_here("compare", "theirs.safetensors", "--checkpoint", "model", "--json", code=1)
    kinds = {finding["where"]: finding["kind"] for finding in json.loads(result.stdout)["findings"]}
    assert kinds["layers.0"] == "unexplained"


def test_equal_logits_make_a_tie_of_experts(
    tmp_path: Path, monkeypatch: Patch, mhmoe_here: Run
) -> None:
    """Two experts with one row of the router, and a router that takes the later one."""
    weights = model_at(tmp_path / "model", MH2, tied_experts=(1, 3))
    ours = write_theirs(tmp_path / "ours.safetensors", MH2, weights)

    def route(config: Any, router: Tensor, x: Tensor) -> Any:
        logits = x @ router.T
        p = torch.softmax(logits, dim=-1)
        order = torch.sort(p.detach().flip(-1), dim=-1, descending=True, stable=True).indices
        experts = (config.num_experts - 1 - order)[:, : config.num_experts_per_tok]
        gates = p.gather(1, experts)
        return oracle.Routing(logits, p, experts, gates / gates.sum(dim=-1, keepdim=True))

    monkeypatch.setattr(oracle, "route", route)
    theirs = write_theirs(tmp_path / "theirs.safetensors", MH2, weights)
    assert (theirs["layers.1.experts"] != ours["layers.1.experts"]).any()
    result = mhmoe_here("compare", "theirs.safetensors", "--checkpoint", "model", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["tensors"]}
    assert rows["layers.1.experts"]["verdict"] == "tie"
    assert "logits are equal to rounding" in rows["layers.1.experts"]["note"]
    assert rows["layers.1.hidden"]["verdict"] == "same"
    # Two traces cannot go on from the other's choice: what follows the tie differs.
    result = mhmoe_here("compare", "theirs.safetensors", "ours.safetensors", "--json", code=1)
    rows = {row["name"]: row for row in json.loads(result.stdout)["tensors"]}
    assert rows["layers.0.experts"]["verdict"] == "tie"
    assert json.loads(result.stdout)["first_difference"] == "layers.0.hidden"
    # A choice that the logits do not excuse is a failure.
    theirs["layers.0.experts"] = theirs["layers.0.experts"][:, ::-1]
    save_tensors(tmp_path / "wrong.safetensors", theirs)
    mhmoe_here("compare", "wrong.safetensors", "--checkpoint", "model", code=1)


def test_float32_of_both_sides_is_within_tolerance(tmp_path: Path, mhmoe_here: Run) -> None:
    for kind in ("mh3-capacity-raw", "dense-relu2-sub-norm-untied", "mh2-shared"):
        weights = model_at(tmp_path / kind, KINDS[kind])
        write_theirs(tmp_path / f"{kind}.safetensors", KINDS[kind], weights, torch.float32)
        mhmoe_here("compare", f"{kind}.safetensors", "--checkpoint", kind)


def test_a_trace_of_other_axes_and_narrower_integers_is_the_same(
    tmp_path: Path, mhmoe_here: Run
) -> None:
    weights = model_at(tmp_path / "model", MH2)
    theirs = write_theirs(tmp_path / "theirs.safetensors", MH2, weights)
    N, E, K = TOKENS[:, 1:].size, 5, 2
    for i in range(2):
        theirs[f"layers.{i}.hidden"] = theirs[f"layers.{i}.hidden"].reshape(N, -1)
        theirs[f"layers.{i}.router_logits"] = theirs[f"layers.{i}.router_logits"].reshape(2, -1, E)
        theirs[f"layers.{i}.experts"] = theirs[f"layers.{i}.experts"].reshape(2, -1, K).astype(np.int32)
    save_tensors(tmp_path / "flat.safetensors", theirs)
    mhmoe_here("compare", "flat.safetensors", "--checkpoint", "model")
    mhmoe_here("compare", "flat.safetensors", "theirs.safetensors")


def test_what_no_hypothesis_explains_has_its_pattern(tmp_path: Path, mhmoe_here: Run) -> None:
    """Rows of the router in another order, and a hidden state that is not finite."""
    weights = model_at(tmp_path / "model", MH2)
    theirs = write_theirs(tmp_path / "theirs.safetensors", MH2, weights)
    theirs["layers.0.router_logits"] = theirs["layers.0.router_logits"][::-1]
    theirs["layers.1.hidden"] = theirs["layers.1.hidden"].copy()
    theirs["layers.1.hidden"][0, 0, 0] = np.nan
    save_tensors(tmp_path / "wrong.safetensors", theirs)
    shown = mhmoe_here("compare", "wrong.safetensors", "--checkpoint", "model", code=1).stdout
    assert "router_logits: it is ours with its rows in reverse" in shown
    found = mhmoe_here("compare", "wrong.safetensors", "--checkpoint", "model", "--json", code=1)
    where = [finding["where"] for finding in json.loads(found.stdout)["findings"]]
    assert where[:2] == BOTH


# ---- bad input ---------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, mhmoe_here: Run) -> None:
    model_at(tmp_path / "model", KINDS["dense"])
    ids = np.ones((1, 4), np.int64)
    files: dict[str, dict[str, Any]] = {
        "right.npz": {"input_ids": ids, "logits": np.ones((1, 4, 37))},
        "half.npz": {"logits": np.ones(3, np.float16)},
        "pickled.npz": {"logits": np.array([{}], object)},
        "other.npz": {"something": np.ones(3)},
        "no-ids.npz": {"logits": np.ones((1, 4, 37))},
        "flat-ids.npz": {"input_ids": np.ones(4, np.int64)},
        "float-ids.npz": {"input_ids": np.ones((1, 4))},
        "large-ids.npz": {"input_ids": 37 * ids},
        "long-ids.npz": {"input_ids": np.ones((1, 33), np.int64)},
        "odd-targets.npz": {"input_ids": ids, "target_ids": ids[:, :3]},
    }
    for name, tensors in files.items():
        np.savez(tmp_path / name, **tensors)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "right.npz").read_bytes()[:60])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    (tmp_path / "trace.pt").write_bytes(b"x")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "twice.json").write_text('{"a": "logits", "b": "logits"}')
    (tmp_path / "unknown.json").write_text('{"logit": "logits"}')
    (tmp_path / "clash.json").write_text('{"input_ids": "logits"}')
    checkpoint = ("--checkpoint", "model")
    for arguments, word in (
        (("right.npz",), "give a second trace or --checkpoint"),
        (("right.npz", "right.npz", *checkpoint), "one of the two"),
        (("absent.npz", *checkpoint), "no such file"),
        (("trace.pt", *checkpoint), ".safetensors or .npz"),
        (("torn.npz", *checkpoint), "not a readable .npz"),
        (("torn.safetensors", *checkpoint), "not a readable safetensors"),
        (("half.npz", "right.npz"), "is float16; write it as"),
        (("pickled.npz", "right.npz"), "not a readable .npz file"),
        (("other.npz", "right.npz"), "no tensor to compare"),
        (("no-ids.npz", *checkpoint), "lacks 'input_ids'"),
        (("flat-ids.npz", *checkpoint), "integers [B, T]"),
        (("float-ids.npz", *checkpoint), "integers [B, T]"),
        (("large-ids.npz", *checkpoint), "0 .. 36"),
        (("long-ids.npz", *checkpoint), "max_position_embeddings"),
        (("odd-targets.npz", *checkpoint), "of the shape of 'input_ids'"),
        (("right.npz", "right.npz", "--names", "list.json"), "JSON object"),
        (("right.npz", "right.npz", "--names", "twice.json"), "two names stand for 'logits'"),
        (("right.npz", "right.npz", "--names", "unknown.json"), "no trace has a tensor 'logit'"),
        (("right.npz", "right.npz", "--names", "clash.json"), "beside 'input_ids'"),
        (("right.npz", "--checkpoint", "absent"), "no such checkpoint"),
        (("right.npz", *checkpoint, "--tolerance", "nan"), "--tolerance"),
    ):
        result = mhmoe_here("compare", *arguments, code=2)
        assert word in result.stderr, arguments
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
