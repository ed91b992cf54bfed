"""Parameters and multiply-adds in closed form, against a model's tensors and what its forward does."""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np
import pytest

from mhmoe_np.audit.models import KINDS, settings
from mhmoe_np.costs.model import macs_per_token, parameter_count
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig


@pytest.mark.parametrize("kind", KINDS)
def test_active_parameters_are_those_of_as_many_experts_as_a_token_can_choose(kind: str) -> None:
    # [spec 1 tensor names], [spec 7 MoE-layer parameters]
    config = ModelConfig.model_validate(settings(kind))
    tensors = Parameters(config, np.float32).tensors
    chosen = config.moe_heads * config.num_experts_per_tok
    idle = sum(
        tensor.size
        for name, tensor in tensors.items()
        if (expert := re.search(r"\.experts\.(\d+)\.", name)) and int(expert[1]) >= chosen
    )
    total = sum(tensor.size for tensor in tensors.values())
    assert parameter_count(config) == (total, total - idle)


class Counting:
    """Operations that count the multiply-adds of the products they are asked for."""

    def __init__(self) -> None:
        self.ops, self.macs = load_operations("numpy"), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        y = self.ops.linear(x, w, b)
        self.macs += y.size * x.shape[1]
        return y

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        batch, queries, heads, width = q.shape
        both = 2 * batch * heads * queries * k.shape[1] * width
        self.macs += both // 2  # causal
        return self.ops.attention(q, k, v)

    def expert_ffn(self, x: Any, gate: Any, dispatch: Any, *rest: Any, **keywords: Any) -> Any:
        y, cache = self.ops.expert_ffn(x, gate, dispatch, *rest, **keywords)
        inner = cache.gate_up_R2F.shape[1] // 2
        self.macs += 3 * len(dispatch.route_R) * x.shape[1] * inner
        return y, cache

    def token_nll(self, x: Any, w: Any, target: Any) -> Any:
        self.macs += x.size * len(w)
        return self.ops.token_nll(x, w, target)


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_are_those_of_a_forward(kind: str) -> None:
    # [spec 7 multiply-adds]
    config = ModelConfig.model_validate(settings(kind))
    parameters = Parameters(config, np.float64)
    initialise(parameters, 1)
    counting = Counting()
    ops = cast(Operations, counting)
    model = Model.of(parameters, ops=ops)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (3, 12))
    x, _ = forward(model, tokens, None, drop=False, ops=ops)
    ops.token_nll(x, model.weights.output_VD, tokens.reshape(-1))
    assert counting.macs == tokens.size * sum(macs_per_token(config, tokens.shape[1]).values())
