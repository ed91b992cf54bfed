"""Ports checked with the vectors: a PyTorch module, a whole PyTorch model, a JAX function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from mhmoe_np.conformance.folder import SHIPPED
from tests.conformance import jax_port, torch_operations, torch_port
from tests.conformance.results import VECTORS, checked, named, save, save_npz, tensors_of
from tests.oracle.torch_model import trace

LAYERS = named("moe_layer/*")
MODELS = named("model/*")
# Each is compiled anew, which takes time; together they have every part of the layer.
IN_FLOAT32 = ["moe_layer/mh2-capacity", "moe_layer/mh2-sign-projections", "moe_layer/ties"]
IN_FLOAT64 = ["moe_layer/mh2-shared-sub-norm"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_torch(folder: Path, names: list[str], dtype: Any, layer: Any) -> None:
    for name in names:
        options = VECTORS[name]["options"]
        save(folder, name, torch_port.results_of(layer, options, tensors_of(name), dtype))


def write_jax(folder: Path, names: list[str], dtype: Any, choose: Any) -> None:
    for name in names:
        options = VECTORS[name]["options"]
        results = jax_port.results_of(options, tensors_of(name), dtype, choose=choose)
        save_npz(folder, name, {key: np.asarray(array) for key, array in results.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operations_pass_in_pytorch(dtype: Any, tmp_path: Path) -> None:
    """All but packed bytes, whose layout is this package's own."""
    subjects = {name.partition("/")[0] for name in VECTORS} - {"moe_layer", "model", "pack"}
    assert torch_operations.OPERATIONS.keys() == subjects
    patterns = [f"{subject}/*" for subject in subjects]
    for name in (name for pattern in patterns for name in named(pattern)):
        results = torch_operations.results_of(name, VECTORS[name], tensors_of(name), dtype)
        save(tmp_path, name, results)
    checked(tmp_path, *patterns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_pytorch_module_passes(dtype: Any, tmp_path: Path) -> None:
    write_torch(tmp_path, LAYERS, dtype, torch_port.MultiHeadMoE)
    checked(tmp_path, "moe_layer/*")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_independent_model_passes(dtype: Any, tmp_path: Path) -> None:
    for name in MODELS:
        weights = load_file(SHIPPED / name / "model.safetensors")
        given = tensors_of(name)
        tokens = np.concatenate([given["input_ids"], given["target_ids"][:, -1:]], axis=1)
        save(tmp_path, name, trace(VECTORS[name]["options"], weights, tokens, dtype=dtype))
    checked(tmp_path, "model/*")


def test_the_jax_function_passes_in_float32(tmp_path: Path) -> None:
    write_jax(tmp_path, IN_FLOAT32, np.float32, jax_port.gates_of)
    checked(tmp_path, *IN_FLOAT32)


def test_the_jax_function_passes_in_float64(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        write_jax(tmp_path, IN_FLOAT64, np.float64, jax_port.gates_of)
    checked(tmp_path, *IN_FLOAT64)


# ---- planted errors --------------------------------------------------------------------------


def each_fails(folder: Path, words: dict[str, str]) -> None:
    """The script fails every one of these vectors, and says these words of it."""
    lines = checked(folder, *words, code=1).splitlines()
    assert lines.pop() == f"0 of {len(words)} vectors pass"
    assert {line.split()[1] for line in lines} == words.keys()
    for line in lines:
        assert words[line.split()[1]] in line


class RawGates(torch_port.MultiHeadMoE):
    def choose(self, p: Tensor) -> tuple[Tensor, Tensor]:
        _, experts = super().choose(p)
        return p.gather(1, experts), experts


class HigherIndexFirst(torch_port.MultiHeadMoE):
    def choose(self, p: Tensor) -> tuple[Tensor, Tensor]:
        gates, experts = super().choose(p.flip(1))
        return gates, p.shape[1] - 1 - experts


class DroppedThenRenormalised(torch_port.MultiHeadMoE):
    """Gates divided by the sum of those that are kept."""

    def choose(self, p: Tensor) -> tuple[Tensor, Tensor]:
        gates, experts = super().choose(p)
        gates = gates * self.kept(experts)
        return gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9), experts


class SecondChoicesAlongside(torch_port.MultiHeadMoE):
    """Capacity filled sub-token by sub-token."""

    def kept(self, experts: Tensor) -> Tensor:
        return super().kept(experts.reshape(-1, 1)).reshape(experts.shape)


class BalanceOfAllChoices(torch_port.MultiHeadMoE):
    def router_losses(self, logits: Tensor, p: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        self.config = {**self.config, "router_aux_loss_type": "topk"}
        return super().router_losses(logits, p, experts)


class HeadsInterleaved(torch_port.MultiHeadMoE):
    def forward(self, x: Tensor, counted: Tensor) -> dict[str, Tensor]:
        D = x.shape[1]
        swapped = torch.arange(D).reshape(-1, self.config["moe_heads"]).T.reshape(-1)
        return super().forward(x[:, swapped], counted)


def test_errors_in_the_module_are_caught(tmp_path: Path) -> None:
    planted = {
        "moe_layer/mh3": (RawGates, "first beyond its tolerance: y_ND"),
        "moe_layer/ties": (HigherIndexFirst, "experts["),
        "moe_layer/mh2-capacity": (DroppedThenRenormalised, "first beyond its tolerance: y_ND"),
        "moe_layer/empty-experts": (SecondChoicesAlongside, "first beyond its tolerance: y_ND"),
        "moe_layer/mh2": (BalanceOfAllChoices, "aux_loss is "),
        "moe_layer/mh2-neither": (HeadsInterleaved, "first beyond its tolerance: router_logits"),
    }
    for vector, (layer, _) in planted.items():
        write_torch(tmp_path, [vector], torch.float32, layer)
    each_fails(tmp_path, {vector: words for vector, (_, words) in planted.items()})


def half_away_from_zero(t: Any, options: Any) -> Any:
    gamma = t["x_NI"].abs().amax(dim=1).clamp(min=1e-5)
    product = t["x_NI"] * (127 / gamma)[:, None]
    return {"q_NI": product.sign() * (product.abs() + 0.5).floor(), "scale_N": gamma / 127}


def above_zero_for_zero(t: Any, options: Any) -> Any:
    results = torch_operations.quantise_weight(t, options)
    return {**results, "q_OI": torch.where(t["w_OI"] >= t["w_OI"].mean(), 1.0, -1.0)}


def other_epsilon(t: Any, options: Any) -> Any:
    return torch_operations.rms_norm(t, {**options, "eps": 1.2e-5})


def heads_alternating(t: Any, options: Any) -> Any:
    """Query head a reads key/value head a % G."""
    order = [0, 2, 1, 3]
    results = torch_operations.attention({**t, "q_BTAC": t["q_BTAC"][:, :, order]}, options)
    return {
        "out_BTAC": results["out_BTAC"][:, :, order],
        "log_sum_exp_BAT": results["log_sum_exp_BAT"][:, order],
    }


def mean_over_all(t: Any, options: Any) -> Any:
    return torch_operations.route({**t, "counted_M": torch.ones_like(t["counted_M"])}, options)


def dropless(t: Any, options: Any) -> Any:
    return torch_operations.expert_ffn(t, {**options, "capacity": None})


def test_errors_in_operations_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "quantise_rows/ties": (half_away_from_zero, "q_NI[0, 1] is 1.0, must be 0.0"),
        "quantise_weight/bitnet-ties": (above_zero_for_zero, "q_OI[1, 0] is 1.0, must be -1.0"),
        "rms_norm/small": (other_epsilon, "rstd_N"),
        "attention/grouped": (heads_alternating, "out_BTAC"),
        "route/raw": (mean_over_all, "dlogits_ME"),
        "expert_ffn/drops": (dropless, "first beyond its tolerance: y_MU"),
    }
    for vector, (operation, _) in planted.items():
        monkeypatch.setitem(torch_operations.OPERATIONS, vector.partition("/")[0], operation)
        entry, tensors = VECTORS[vector], tensors_of(vector)
        results = torch_operations.results_of(vector, entry, tensors, torch.float32)
        save(tmp_path, vector, results)
    each_fails(tmp_path, {vector: words for vector, (_, words) in planted.items()})


def raw_gates(p: jax.Array, config: Any) -> Any:
    return jax_port.gates_of(p, {**config, "norm_topk_prob": False})


def higher_index_first(p: jax.Array, config: Any) -> Any:
    gates, experts = jax_port.gates_of(jnp.flip(p, axis=1), config)
    return gates, p.shape[1] - 1 - experts


def test_errors_in_the_function_are_caught(tmp_path: Path) -> None:
    write_jax(tmp_path, ["moe_layer/mh2"], np.float32, raw_gates)
    write_jax(tmp_path, ["moe_layer/ties"], np.float32, higher_index_first)
    each_fails(
        tmp_path,
        {"moe_layer/mh2": "first beyond its tolerance: y_ND", "moe_layer/ties": "experts["},
    )
