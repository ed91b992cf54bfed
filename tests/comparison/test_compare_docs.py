"""What docs/compare.md shows is run: its PyTorch on a foreign model, its C++ through a compiler."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhmoe_np.audit.models import BASE
from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.comparison.trace_file import read_trace
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.settings.model import ModelConfig
from tests.conftest import Run

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
TOKENS = np.random.default_rng(3).integers(0, 37, (2, 9))


def block(language: str, having: str) -> str:
    """The page's block of code that has this in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return next(text for text in blocks if having in text)


class Attention(torch.nn.Module):
    """As in Hugging Face's Llama, without a cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        C = D // self.heads
        q, k, v = (
            project(x).view(B, T, self.heads, C).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        frequency = 10000.0 ** (-torch.arange(0, C, 2, dtype=x.dtype) / C)
        angle = torch.outer(torch.arange(T, dtype=x.dtype), frequency)
        cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))

        def rotated(y: torch.Tensor) -> torch.Tensor:
            half = torch.cat([-y[..., C // 2 :], y[..., : C // 2]], dim=-1)
            return y * cos + half * sin

        y = torch.nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(torch.nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(width, inner, bias=False)
        self.up_proj = torch.nn.Linear(width, inner, bias=False)
        self.down_proj = torch.nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(torch.nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = torch.nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.self_attn = Attention(D, config.num_attention_heads)
        self.post_attention_layernorm = torch.nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.mlp = FeedForward(D, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Output:
    """What a causal model of Hugging Face returns."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Llama(torch.nn.Module):
    """A dense model of PyTorch's own modules, under the names of Hugging Face."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, ids: torch.Tensor) -> Output:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return Output(self.model.norm(x) @ self.model.embed_tokens.weight.T)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_the_hooks_of_the_page_write_a_trace_that_compares(
    epsilon: float, tmp_path: Path, mhmoe_here: Run
) -> None:
    config = ModelConfig.model_validate(BASE)
    parameters = Parameters(config, np.float64)
    initialise(parameters, 2)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", parameters, None)
    theirs = Llama(config.model_copy(update={"rms_norm_eps": epsilon})).double()
    weights = {name: torch.from_numpy(tensor.copy()) for name, tensor in parameters.tensors.items()}
    theirs.load_state_dict(weights)
    names: dict[str, Any] = {}
    exec(block("python", "register_forward_hook"), names)
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(TOKENS[:, i : 8 + i])) for i in (0, 1))
    names["write_trace"](theirs, inputs, targets, tmp_path / "theirs.safetensors")
    right = epsilon == config.rms_norm_eps
    arguments = ("compare", "theirs.safetensors", "--checkpoint", "model", "--json")
    found = json.loads(mhmoe_here(*arguments, code=0 if right else 1).stdout)
    compared = {row["name"] for row in found["tensors"]}
    assert {"layers.0.hidden", "layers.1.hidden", "logits", "nll"} < compared
    assert {f"grad.{name}" for name in parameters.tensors} < compared
    causes = {finding["text"] for finding in found["findings"] if finding["kind"] == "cause"}
    assert causes == (set() if right else {"rms_norm_eps is 1e-06 and not 1e-05"})


def test_the_pages_c_plus_plus_writes_a_trace(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = block("cpp", "struct Trace") + (
        "int main() { Trace trace;"
        ' trace.add<double>("layers.0.hidden", "F64", "[1, 2, 2]", {1, 2.5, -3, 0.1});'
        ' trace.add<std::int64_t>("input_ids", "I64", "[1, 2]", {7, -100});'
        ' trace.write("trace.safetensors"); }'
    )
    (tmp_path / "trace.cpp").write_text(program)
    subprocess.run([compiler, "-Wall", "-Werror", "trace.cpp"], cwd=tmp_path, check=True)
    subprocess.run(["./a.out"], cwd=tmp_path, check=True)
    trace = read_trace(tmp_path / "trace.safetensors")
    np.testing.assert_array_equal(trace["layers.0.hidden"], [[[1, 2.5], [-3, 0.1]]])
    np.testing.assert_array_equal(trace["input_ids"], [[7, -100]])
