"""`trace --operations` beside what hooks on the independent PyTorch model see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhmoe_np.audit.models import KINDS, parameters, settings
from mhmoe_np.audit.recorder import Wanted
from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.load import load_operations
from mhmoe_np.storage.tensors import save_tensors
from tests.conftest import Run
from tests.oracle import torch_model as oracle

TOKENS = np.random.default_rng(3).integers(0, 37, (2, 9))
TOKENS[1, 7:] = -100


def hooked(kind: str, weights: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The independent model's trace, with what its linear maps and norms are given and return."""
    seen: dict[str, np.ndarray] = {}
    modules: dict[int, str] = {}
    forward, linear, rms_norm = oracle.forward, oracle.linear, oracle.rms_norm

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach().numpy().copy()

    def named_forward(config: Any, weights: dict[str, Tensor], inputs: Tensor) -> Any:
        for name, weight in weights.items():
            modules[id(weight)] = name.removeprefix("model.").removesuffix(".weight")
        return forward(config, weights, inputs)

    def hooked_linear(x: Tensor, weight: Tensor, quantization: str) -> Tensor:
        y, module = linear(x, weight, quantization), modules[id(weight)]
        keep(f"{module}.input", x)
        keep(f"{module}.output", y)
        if quantization != "none":
            q, gamma = oracle.quantize_rows(x)
            w, beta = oracle.quantize_weight(weight, quantization)
            keep(f"{module}.input_integers", q.to(dtype=torch.int8))
            keep(f"{module}.input_scale", gamma.reshape(-1) / 127)
            keep(f"{module}.weight_integers", w.to(dtype=torch.int8))
            keep(f"{module}.weight_scale", beta)
        return y

    def hooked_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, module = rms_norm(x, weight, eps), modules[id(weight)]
        keep(f"{module}.input", x)
        keep(f"{module}.output", y)
        return y

    patch.setattr(oracle, "forward", named_forward)
    patch.setattr(oracle, "linear", hooked_linear)
    patch.setattr(oracle, "rms_norm", hooked_norm)
    return oracle.trace(settings(kind), weights, TOKENS) | seen


@pytest.mark.parametrize("kind", ["mh2-shared-sub-norm", "mh3-ternary-shared-capacity"])
def test_operands_are_those_that_hooks_see(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mhmoe_here: Run
) -> None:
    initial, ops = parameters(kind, np.float64), load_operations("numpy")
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", initial, None)
    weights = {name: np.ascontiguousarray(tensor) for name, tensor in initial.tensors.items()}
    with monkeypatch.context() as patch:
        theirs = hooked(kind, weights, patch)
    model = Model.of(initial, ops=ops)
    ours = trace(model, TOKENS, gradients=True, wanted=Wanted(operations=True), ops=ops)
    missing = theirs.keys() - ours.keys()
    assert not missing
    save_tensors(tmp_path / "theirs.safetensors", theirs)
    save_tensors(tmp_path / "ours.safetensors", ours)
    mhmoe_here("compare", "theirs.safetensors", "ours.safetensors")

    # Each operation by itself: ours, with names that theirs lacks, and one result that is wrong.
    found = json.loads(
        mhmoe_here("compare", "ours.safetensors", "--checkpoint", "model", "--json").stdout
    )
    compared = {row["name"] for row in found["tensors"]}
    outputs = {name for name in ours if name.endswith(("output", "rotated", "integers", "scale"))}
    assert outputs - compared == experts_outputs(kind)
    name = "layers.0.self_attn.attention.output"
    ours[name] = 2 * ours[name]
    save_tensors(tmp_path / "wrong.safetensors", ours)
    result = mhmoe_here("compare", "wrong.safetensors", "--checkpoint", "model", "--json", code=1)
    found = json.loads(result.stdout)
    assert found["first_difference"] == name
    wrong = {row["name"] for row in found["tensors"] if row["verdict"] == "different"}
    assert wrong == {name}


def experts_outputs(kind: str) -> set[str]:
    step = KINDS[kind].get("decoder_sparse_step", 2)
    return {f"layers.{i}.mlp.experts.output" for i in range(2) if (i + 1) % step == 0}
