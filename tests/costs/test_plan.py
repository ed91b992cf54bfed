"""`mhmoe-np plan`: what it says agrees with the configuration, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.costs.model import parameter_count
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.settings.run import parse_run_config, read_toml
from tests.conftest import Run

CONFIG = """
[model]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
num_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 24
moe_heads = 2

[training]
steps = 20
batch_size = 8
sequence_length = 64
"""


@pytest.fixture
def plan(mhmoe: Run, tmp_path: Path) -> Any:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("a few words\n" * 500)

    def make(*settings: str) -> dict[str, Any]:
        options = [option for setting in settings for option in ("--set", setting)]
        result = mhmoe("plan", "config.toml", "--data", "text.txt", "--json", *options)
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return make


def test_a_plan_adds_up_and_writes_nothing(plan: Any, tmp_path: Path) -> None:
    found = plan()
    config = parse_run_config(read_toml(tmp_path / "config.toml"), source="config.toml")
    assert found["parameters"] == parameter_count(config.model)._asdict()
    buffer = Parameters(config.model, np.float32).flat_P.nbytes
    memory = found["memory"]
    assert (memory["parameters"], memory["gradient"], memory["moments"]) == (buffer, buffer, 2 * buffer)
    assert memory["quantised"] == 0
    assert memory["peak"] == sum(memory.values()) - memory["peak"]
    assert found["training_seconds"] == pytest.approx(20 * found["step_seconds"])
    assert found["tokens_per_s"] == pytest.approx(8 * 64 / found["step_seconds"])
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "text.txt"}


def test_buffers_of_a_large_batch_follow_from_two_small_ones(plan: Any) -> None:
    # 2,048 tokens are the smaller probe, 4,096 the larger; the third is beyond both.
    small, large, beyond = (
        plan(f"training.batch_size={size}")["memory"]["activations"] for size in (32, 64, 128)
    )
    assert beyond == pytest.approx(large + 2 * (large - small), rel=0.02)
    assert plan("training.batch_size=128", "training.gradient_accumulation_steps=2")["memory"][
        "activations"
    ] == pytest.approx(large, rel=0.02)


def test_a_bitnet_plan_counts_the_quantised_copy(plan: Any, tmp_path: Path) -> None:
    quantised = plan("quantization=bitnet_b158")["memory"]["quantised"]
    config = parse_run_config(read_toml(tmp_path / "config.toml"), source="config.toml").model
    weights = [
        tensor.size
        for name, tensor in Parameters(config, np.float32).tensors.items()
        if "_proj" in name and "head_proj" not in name and "merge_proj" not in name
    ]
    # A float and two bits each, and the scales and padding of small matrices.
    assert 4.25 * sum(weights) < quantised < 6 * sum(weights)


def test_a_model_that_cannot_fit_is_refused_with_a_remedy(mhmoe: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    result = mhmoe("plan", "config.toml", "--set", "vocab_size=2000000000", code=2)
    assert "make the model smaller" in result.stderr


def test_the_table_names_every_forecast(mhmoe: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    printed = mhmoe("plan", "config.toml").stdout
    for row in ("parameters", "FLOPs a token", "memory at the peak", "tokens/s", "all steps", "disk"):
        assert row in printed
