"""Traces against an independent PyTorch model written from the specification alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file

from mhmoe_np.audit.models import KINDS, parameters, settings
from mhmoe_np.audit.recorder import Wanted
from mhmoe_np.audit.trace import trace
from mhmoe_np.model.language_model import Model
from mhmoe_np.operations.door import Door, Promise, Visit
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName, Operations
from tests.conftest import Run
from tests.oracle.torch_model import trace as oracle_trace

TOKENS = np.random.default_rng(3).integers(0, 37, (3, 12))
PADDED = TOKENS.copy()
PADDED[0, 7:] = -100
PADDED[2, 11:] = -100


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["full", "padded"])
def test_every_tensor_of_a_trace_equals_the_independent_model(
    kind: str, tokens: np.ndarray, backend: BackendName
) -> None:
    # The layer: [P1 eq. 1-5], [P2 eq. 4-6, 8], [spec 3 head layer], [spec 3 reshape],
    # [spec 3 softmax], [spec 3 K largest], [spec 3 Expert], [spec 3 merge layer],
    # [spec 3 SharedExpert].
    # The rest: [spec 1 Model keys], [spec 1 tensor names], [spec 1 embed_tokens], [spec 1 not tied],
    # [spec 2 pre-norm], [spec 2 final norm], [spec 2 RMSNorm], [spec 2 attention], [spec 2 RoPE],
    # [spec 2 FFN], [GLU eq. 5-6], [spec 2 use_sub_norm], [spec 2 logits].
    # Losses: [spec 4 NLL], [spec 4 aux], [spec 4 z-loss], [spec 4 loss], [spec 4 not counted],
    # [spec 4 capacity], [Switch eq. 4-6], [P2 eq. 10-11], [ST-MoE eq. 5].
    # BitNet: [spec 5 BitLinear], [spec 5 never quantised], [spec 5 straight-through].
    initial = parameters(kind, np.float64)
    ops = load_operations(backend)
    ours = trace(Model.of(initial, ops=ops), tokens, gradients=True, ops=ops)
    weights = {name: np.ascontiguousarray(tensor) for name, tensor in initial.tensors.items()}
    theirs = oracle_trace(settings(kind), weights, tokens)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if tensor.dtype.kind == "i":
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
        else:
            error = np.abs(ours[name] - tensor).max()
            assert error <= 1e-10 * np.abs(tensor).max(), name


def test_the_command_writes_what_the_library_computes(mhmoe: Run, tmp_path: Path) -> None:
    # [spec 8 trace], [spec 1 Checkpoint directory]
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2-shared")))
    np.save(tmp_path / "tokens.npy", PADDED)
    mhmoe("init", "config.json", "--out", "model", "--seed", 5)
    mhmoe("trace", "model", "--tokens", "tokens.npy", "--out", "a.safetensors", "--dtype", "float64")
    written = load_file(tmp_path / "a.safetensors")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    theirs = oracle_trace(config, weights, PADDED)
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert written[name].shape == tensor.shape, name
        assert np.abs(written[name] - tensor).max() <= 1e-10 * np.abs(tensor).max(), name

    (tmp_path / "tokens.json").write_text(json.dumps(PADDED.tolist()))
    mhmoe("trace", "model", "--tokens", "tokens.json", "--out", "b.safetensors", "--no-grad")
    names = load_file(tmp_path / "b.safetensors").keys()
    assert names == {n for n in theirs if n.split(".")[0] in ("layers", "logits", "input_ids")}


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((2, 5)), "integers"),
        (np.zeros(5, int), "two-dimensional"),
        (np.full((1, 4), 37), "0 .. 36"),
        (np.full((1, 4), -1), "0 .. 36"),
        (np.array([[1, -100, 2]]), "right end"),
        (np.array([[1, -100, -100]]), "no target"),
        (np.zeros((1, 34), int), "max_position_embeddings"),
    ],
)
def test_unfit_tokens_are_one_line_and_write_nothing(
    mhmoe_here: Run, tmp_path: Path, array: np.ndarray, word: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings("dense")))
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 0)
    np.save(tmp_path / "tokens.npy", array)
    result = mhmoe_here("trace", "model", "--tokens", "tokens.npy", "--out", "t.safetensors", code=2)
    assert word in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "t.safetensors").exists()


class Counted(Door):
    """Operations whose calls are listed."""

    def __init__(self, ops: Operations) -> None:
        super().__init__(ops)
        self.calls: list[str] = []

    def visit(self, operation: str, promise: Promise) -> Visit:
        self.calls.append(operation)
        return Unseen()


class Unseen:
    """A call that nobody looks at."""

    def enter(self, arguments: Mapping[str, Any]) -> None: ...

    def leave(self, results: Sequence[Any]) -> None: ...


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [
        ("input_ids", 0, 0),
        ("layers.0.router_logits", 1, 0),
        ("layers.0.hidden", 1, 0),
        ("logits", 2, 0),
        ("aux_loss", 2, 0),
        ("grad.model.layers.1.mlp.gate.weight", 2, 0),
        ("grad.model.layers.1.self_attn.q_proj.weight", 2, 1),
    ],
)
def test_nothing_is_computed_or_written_after_the_tensor_to_stop_at(
    name: str, forwards: int, backwards: int
) -> None:
    initial, ops = parameters("mh2", np.float64), load_operations("numpy")
    model = Model.of(initial, ops=ops)
    everything = trace(model, PADDED, gradients=True, ops=ops)
    counted = Counted(ops)
    stopped = trace(
        model, PADDED, gradients=True, wanted=Wanted(stop_at=name), ops=cast(Operations, counted)
    )
    assert counted.calls.count("attention") == forwards
    assert counted.calls.count("attention_backward") == backwards
    order = list(everything)
    assert list(stopped) == order[: order.index(name) + 1]
    for each, tensor in stopped.items():
        np.testing.assert_array_equal(tensor, everything[each], err_msg=each)


def test_only_what_is_asked_for_is_written(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings("mh2")))
    np.save(tmp_path / "tokens.npy", PADDED)
    mhmoe_here("init", "config.json", "--out", "model", "--seed", 5)
    arguments = ("trace", "model", "--tokens", "tokens.npy", "--backend", "numpy")
    patterns = ("--only", "layers.1.*", "--only", "*loss", "--stop-at", "loss")
    mhmoe_here(*arguments, "--out", "a.safetensors", *patterns)
    assert load_file(tmp_path / "a.safetensors").keys() == {
        *("layers.1.router_logits", "layers.1.experts", "layers.1.hidden"),
        *("aux_loss", "z_loss", "loss"),
    }
    for options, word in (
        (("--stop-at", "layers.1.hiden"), "did you mean 'layers.1.hidden'"),
        (("--only", "layers.7.*"), "no tensor of the trace has such a name"),
        (("--no-grad", "--stop-at", "nll"), "no such tensor"),
    ):
        result = mhmoe_here(*arguments, "--out", "b.safetensors", *options, code=2)
        assert word in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "b.safetensors").exists()
